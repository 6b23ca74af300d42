// What pages with cards of features share: data.up and data.down are features, and card(feature, way) shows one.
const percent = value => +(100 * value).toPrecision(3) + ' %';

function headed(feature, way, figure, about) {
  const made = element('article'), header = element('header'), name = element('b');
  name.append(feature.name);
  header.append(name);
  if (feature.address) header.append(link('Neuronpedia', feature.address));
  header.append(element('span', 'by ' + way, figure), element('p', 'dim', about));
  made.append(header);
  return made;
}

// A text from which more may be left out, token by token; the strongest value of its card has the strongest colour
function tokens(excerpt, values, strongest, way, about = '') {
  const box = element('div', 'tokens');
  if (!excerpt.starts) box.append('\u2026');
  excerpt.tokens.forEach((text, i) => {
    const token = element('span', '', text.replaceAll('\n', '\u23ce')), value = values[i];
    if (value > 0) token.style.background = `rgb(var(--${way}-rgb) / ${(0.08 + 0.72 * value / strongest).toFixed(3)})`;
    tip(token, about + number(value));
    box.append(token);
  });
  if (!excerpt.ends) box.append('\u2026');
  return box;
}

const cardsOf = (features, way) => features.length ? features.map(one => card(one, way)) : [element('p', 'dim', 'None.')];

function cards() {
  for (const way of ['up', 'down']) at(way).append(...cardsOf(data[way], way));
}
