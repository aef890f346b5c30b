// The plan as a table that can be painted: mouse, touch and keyboard.
// The server sends {name, steps, keys, corrected, lines, labels}; a change goes back as one `select`.
const box = element.querySelector('.grid-box');
let shape = null;
let cells = [];       // cells[row + 1][column + 1]; row and column 0 are the heads
let here = [1, 1];
let painted = null;
let pointer = 'mouse';

function make(tag, properties, parent) {
  const node = Object.assign(document.createElement(tag), properties);
  if (parent) parent.appendChild(node);
  return node;
}

function build(grid) {
  box.textContent = '';
  const table = make('table', { className: 'grid' }, box);
  table.setAttribute('role', 'grid');
  const head = make('tr', {}, make('thead', {}, table));
  cells = [[make('th', { className: 'corner' }, head)]];
  for (let step = 0; step < grid.steps; step++) {
    const th = make('th', { className: 'step', tabIndex: -1, textContent: step % 5 ? '' : step }, head);
    th.scope = 'col';
    cells[0].push(th);
  }
  const body = make('tbody', {}, table);
  let block = null;
  grid.lines.forEach((line) => {
    const row = make('tr', {}, body);
    const own = line.at.split('.')[0];
    if (block !== null && own !== block) row.className = 'first';
    block = own;
    const name = make('th', { className: 'unit', tabIndex: -1, textContent: line.at }, row);
    name.scope = 'row';
    const list = [name];
    for (let step = 0; step < grid.steps; step++) {
      const cell = make('td', { tabIndex: -1 }, row);
      cell.setAttribute('role', 'gridcell');
      list.push(cell);
    }
    cells.push(list);
  });
  cells.forEach((list, row) => list.forEach((cell, column) => {
    cell.dataset.row = row;
    cell.dataset.column = column;
  }));
  here = [Math.min(here[0], cells.length - 1), Math.min(here[1], grid.steps)];
  cells[here[0]][here[1]].tabIndex = 0;
}

function draw() {
  const grid = props.value;
  if (!grid || !grid.lines) { box.textContent = ''; shape = null; return; }
  const next = JSON.stringify([grid.steps, grid.lines.map((line) => line.at)]);
  if (next !== shape) { build(grid); shape = next; }
  box.firstChild.setAttribute('aria-label', 'plan ' + grid.name);
  const keys = new Set(grid.keys);
  const corrected = new Set(grid.corrected);
  for (let step = 0; step < grid.steps; step++) {
    const th = cells[0][step + 1];
    th.className = 'step' + (keys.has(step) ? ' key' : '') + (corrected.has(step) ? ' corrected' : '');
    const label = 'step ' + step + (keys.has(step) ? ', in full' : '') +
      (corrected.has(step) ? ', corrected' : '');
    th.title = label;
    th.setAttribute('aria-label', label);
  }
  grid.lines.forEach((line, row) => line.states.forEach((state, step) => {
    const cell = cells[row + 1][step + 1];
    const said = line.says[step] && state === 'idle' ? ' said' : '';
    const name = 'cell ' + state + said;
    if (cell.className !== name) cell.className = name;
    const word = grid.labels[line.at === 'guidance' ? 'guidance' : 'units'][state] || state;
    const label = line.at + ', step ' + step + ': ' + word;
    if (cell.title !== label) { cell.title = label; cell.setAttribute('aria-label', label); }
  }));
}

function find(target) {
  const cell = target && target.closest ? target.closest('td, th') : null;
  if (!cell || !box.contains(cell) || cell.dataset.row === undefined) return null;
  return [Number(cell.dataset.row), Number(cell.dataset.column)];
}

function send(places) {
  const grid = props.value;
  const [row, column] = places[0];
  if (row === 0 && column === 0) return;
  if (row === 0) { trigger('select', { kind: 'step', cells: [['', column - 1]] }); return; }
  if (column === 0) {
    trigger('select', { kind: 'line', cells: [[grid.lines[row - 1].at, 0]] });
    return;
  }
  const inside = places.filter(([r, c]) => r > 0 && c > 0);
  inside.forEach(([r, c]) => cells[r][c].classList.add('sent'));
  trigger('select', {
    kind: 'cells', cells: inside.map(([r, c]) => [grid.lines[r - 1].at, c - 1]),
  });
}

function move(row, column) {
  row = Math.max(0, Math.min(cells.length - 1, row));
  column = Math.max(0, Math.min(cells[0].length - 1, column));
  if (row === 0 && column === 0) column = 1;
  cells[here[0]][here[1]].tabIndex = -1;
  here = [row, column];
  const cell = cells[row][column];
  cell.tabIndex = 0;
  cell.focus();
  cell.scrollIntoView({ block: 'nearest', inline: 'nearest' });
}

box.addEventListener('pointerdown', (event) => {
  pointer = event.pointerType;
  const place = find(event.target);
  if (!place || pointer !== 'mouse' || event.button !== 0) return;
  painted = [place];
  event.preventDefault();
  move(place[0], place[1]);
});
box.addEventListener('pointerover', (event) => {
  const place = find(event.target);
  if (!painted || !place || place[0] === 0 || place[1] === 0) return;
  if (painted.some(([row, column]) => row === place[0] && column === place[1])) return;
  painted.push(place);
  cells[place[0]][place[1]].classList.add('sent');
});
window.addEventListener('pointerup', () => {
  if (painted) { const places = painted; painted = null; send(places); }
});
box.addEventListener('click', (event) => {
  const place = find(event.target);
  if (place && pointer !== 'mouse') send([place]);
});
box.addEventListener('keydown', (event) => {
  const place = find(event.target);
  if (!place) return;
  const [row, column] = place;
  const moves = {
    ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
    ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
    Home: [row, 1], End: [row, cells[0].length - 1],
    PageUp: [1, column], PageDown: [cells.length - 1, column],
  };
  if (moves[event.key]) { event.preventDefault(); move(...moves[event.key]); }
  else if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); send([place]); }
});
watch('value', draw);
draw();
