// What this repo's pages share.
const at = id => document.getElementById(id);
const number = value => value === 0 ? '0' : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString('en') : String(+value.toPrecision(3));
const whole = value => value.toLocaleString('en');
const oneLine = text => text.trim().replace(/\s*\n\s*/g, ' \u23ce ');
// null: a figure that is not finite
const signed = value => value === null ? '\u221e' : (value > 0 ? '+' : value < 0 ? '\u2212' : '') + number(Math.abs(value));

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;  // never HTML: a text may hold anything
  return made;
}

function draw(parent, tag, attributes, text) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function showTip(event, text) {
  const box = at('tip');
  box.hidden = false;
  box.textContent = text;
  box.style.left = Math.max(0, Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8)) + 'px';
  box.style.top = Math.min(event.clientY + 16, innerHeight - box.offsetHeight - 8) + 'px';
}

function hideTip() { at('tip').hidden = true; }

function tip(target, text) {
  target.addEventListener('pointermove', event => showTip(event, text));
  target.addEventListener('pointerleave', hideTip);
}

function row(parent, tag, cells) {
  const made = element('tr');
  for (const cell of cells) {
    const box = element(tag);
    box.append(cell);
    made.append(box);
  }
  parent.append(made);
  return made;
}

function link(name, address) {
  if (!address) return element('span', '', name);
  const made = element('a', '', name);
  made.href = address;
  made.rel = 'noreferrer';
  return made;
}

const scale = (from, to, start, end) => value => start + (end - start) * (value - from) / ((to - from) || 1);
const path = points => points.map(([x, y], i) => (i ? 'L' : 'M') + x.toFixed(1) + ' ' + y.toFixed(1)).join('');

function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= rough);
  const made = [];
  for (let n = Math.ceil(low / step); n * step <= high + step * 1e-9; n++) made.push(+(n * step).toPrecision(12));
  return made;
}

// An estimate with half of its 95 % interval; null: not known
const within = ([value, error], written = number) => value === null ? '\u2013' : written(value) + (error === null ? '' : ' \u00b1 ' + written(error).replace('+', ''));
const share = estimate => within(estimate, value => +(100 * value).toPrecision(Math.abs(value) < 0.1 ? 2 : 3) + ' %');

function axes(svg, x, y, across, up, names, size) {  // across, up: [value, label] of the ticks
  for (const [value, text] of up) {
    draw(svg, 'line', {class: 'grid', x1: size.left, x2: size.right, y1: y(value), y2: y(value)});
    draw(svg, 'text', {x: size.left - 8, y: y(value) + 5, 'text-anchor': 'end'}, text);
  }
  for (const [value, text] of across) {
    draw(svg, 'line', {class: 'axis', x1: x(value), x2: x(value), y1: size.bottom, y2: size.bottom + 5});
    draw(svg, 'text', {x: x(value), y: size.bottom + 21, 'text-anchor': 'middle'}, text);
  }
  draw(svg, 'line', {class: 'axis', x1: size.left, x2: size.right, y1: size.bottom, y2: size.bottom});
  draw(svg, 'text', {x: (size.left + size.right) / 2, y: size.bottom + 44, 'text-anchor': 'middle'}, names);
}
