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

function cards() {
  for (const way of ['up', 'down']) at(way).append(...(data[way].length ? data[way].map(one => card(one, way)) : [element('p', 'dim', 'None.')]));
}
