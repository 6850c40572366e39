'use strict';
// The server answers once for an image and a model; everything else is drawn from that answer.

const $ = (id) => document.getElementById(id);
const CROWD = 40; // boxes
let models = [];
let file = null;
let round = 0; // of the image, so that late answers for an older one are dropped
const views = new Map(); // name of a model -> its card, and what is known of the image
const hidden = new Set(); // names of classes

const isBoxes = (model) => model.task === 'detection' || model.task === 'instance';
const chosen = () => models.filter((m) => !document.querySelector(`#models input[value="${CSS.escape(m.name)}"]:not(:checked)`));

function make(tag, options = {}, ...children) {
  const element = Object.assign(document.createElement(tag), options);
  element.append(...children);
  return element;
}

function swatch(colour) {
  const element = make('span', { className: 'swatch' });
  element.style.background = `rgb(${colour.join(',')})`;
  return element;
}

async function ask(address, body) {
  const response = await fetch(address, body ? { method: 'POST', body } : {});
  let answer;
  try {
    answer = await response.json();
  } catch {
    throw new Error(`The server answers with status ${response.status}.`);
  }
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

async function load(address) {
  const image = new Image();
  image.src = address;
  await image.decode();
  return image;
}

// --- what is shown ------------------------------------------------------------------------------

function iou(a, b) {
  const width = Math.min(a[0] + a[2], b[0] + b[2]) - Math.max(a[0], b[0]);
  const height = Math.min(a[1] + a[3], b[1] + b[3]) - Math.max(a[1], b[1]);
  if (width <= 0 || height <= 0) return 0;
  return (width * height) / (a[2] * a[3] + b[2] * b[3] - width * height);
}

// The indices of the boxes that the sliders and the classes leave, the highest score first.
function shown(model, answer) {
  const all = answer.annotations;
  const score = Number($('score').value);
  const limit = Number($('overlap').value);
  let found = all.map((_, i) => i).filter((i) => all[i].score >= score);
  if (model.overlap !== null) {
    const kept = [];
    for (const i of found) {
      const isCopy = (k) => all[k].category_id === all[i].category_id && iou(all[k].bbox, all[i].bbox) > limit;
      if (!kept.some(isCopy)) kept.push(i);
    }
    found = kept.slice(0, model.limit);
  }
  return found.filter((i) => !hidden.has(all[i].name));
}

function counts(model, answer) {
  const found = new Map();
  if (model.task === 'segmentation') for (const a of answer.annotations) found.set(a.name, a.area);
  if (isBoxes(model)) {
    const all = new Set(hidden);
    hidden.clear();
    for (const i of shown(model, answer)) {
      const { name } = answer.annotations[i];
      found.set(name, (found.get(name) || 0) + 1);
    }
    all.forEach((name) => hidden.add(name));
  }
  return found;
}

function listClasses() {
  const total = new Map();
  for (const model of chosen()) {
    const { answer } = views.get(model.name);
    if (!answer) continue;
    const isMap = model.task === 'segmentation';
    for (const [name, count] of counts(model, answer)) {
      const entry = total.get(name) || { boxes: 0, share: 0, colour: model.colours[model.classes.indexOf(name)] };
      if (isMap) entry.share = count / (answer.width * answer.height);
      else entry.boxes += count;
      total.set(name, entry);
    }
  }
  for (const name of hidden) if (!total.has(name)) total.set(name, { boxes: 0, share: 0, colour: [128, 128, 128] });
  const rows = [...total].map(([name, { boxes, share, colour }]) => {
    const box = make('input', { type: 'checkbox', value: name, checked: !hidden.has(name) });
    const about = [boxes ? String(boxes) : '', share ? `${(100 * share).toFixed(1)} %` : ''].filter(Boolean);
    return make('label', {}, box, swatch(colour), `${name} ${about.join(', ')}`);
  });
  const focused = document.activeElement?.closest('#classes') ? document.activeElement.value : null;
  $('classes').replaceChildren(make('legend', { textContent: 'Classes' }), ...rows);
  if (focused !== null) $('classes').querySelector(`input[value="${CSS.escape(focused)}"]`)?.focus();
  $('classes').hidden = !rows.length;
}

function drawMap(context, model, view) {
  const { width, height } = view.answer;
  const painted = new ImageData(width, height);
  const alpha = Math.round(255 * Number($('opacity').value));
  const colours = model.classes.map((name, i) => (hidden.has(name) ? null : model.colours[i]));
  for (let i = 0; i < width * height; i += 1) {
    const colour = colours[view.labels[4 * i] + 256 * view.labels[4 * i + 1]];
    if (colour) painted.data.set([...colour, alpha], 4 * i);
  }
  const layer = make('canvas', { width, height });
  layer.getContext('2d').putImageData(painted, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(layer, 0, 0);
  context.imageSmoothingEnabled = true;
}

function drawBoxes(context, model, view) {
  const { annotations, width, height } = view.answer;
  const found = shown(model, view.answer);
  const size = Math.max(10 / view.scale, 0.022 * Math.max(width, height));
  context.globalAlpha = Number($('opacity').value);
  for (const i of found) {
    const mask = view.masks?.[i];
    if (mask) context.drawImage(mask.image, mask.x, mask.y);
  }
  context.globalAlpha = 1;
  context.font = `${size}px system-ui, sans-serif`;
  context.textBaseline = 'bottom';
  context.lineWidth = Math.max(1, size / 7);
  for (const i of found.reverse()) {
    const { bbox: [x, y, w, h], name, score, category_id: id } = annotations[i];
    const [red, green, blue] = model.colours[id - 1];
    context.strokeStyle = context.fillStyle = `rgb(${red},${green},${blue})`;
    context.strokeRect(x, y, w, h);
    if (!$('labels').checked) continue;
    const text = `${name} ${score.toFixed(2)}`;
    const edge = size / 4;
    const wide = context.measureText(text).width + 2 * edge;
    const bottom = Math.max(y, size + edge);
    const left = Math.max(0, Math.min(x, width - wide));
    context.fillRect(left, bottom - size - edge, wide, size + edge);
    context.fillStyle = 0.3 * red + 0.59 * green + 0.11 * blue > 140 ? '#000' : '#fff';
    context.fillText(text, left + edge, bottom - edge / 2);
  }
  return found.length;
}

function drawPoint(context, { x, y }, { width, height }) {
  const size = Math.max(8, Math.max(width, height) / 40);
  for (const [colour, wide] of [['#000', 5], ['#fff', 2]]) {
    context.strokeStyle = colour;
    context.lineWidth = (wide * size) / 12;
    context.beginPath();
    context.moveTo(x - size, y);
    context.lineTo(x + size, y);
    context.moveTo(x, y - size);
    context.lineTo(x, y + size);
    context.stroke();
  }
}

function draw(model) {
  const view = views.get(model.name);
  const { answer, canvas, attention } = view;
  if (!answer) return;
  const context = canvas.getContext('2d');
  context.setTransform(view.scale, 0, 0, view.scale, 0, 0);
  context.drawImage(attention?.image || view.picture, 0, 0, answer.width, answer.height);
  let about = `${answer.width} × ${answer.height}, ${answer.seconds.toFixed(2)} s`;
  if (model.task === 'segmentation' && !attention) drawMap(context, model, view);
  if (isBoxes(model)) {
    const number = drawBoxes(context, model, view);
    about = `${number} of ${answer.annotations.length} boxes; ${about}`;
  }
  if (attention) {
    drawPoint(context, attention, answer);
    about = `Block ${attention.block}: ${attention.text}. ${about}`;
  }
  view.about.textContent = about;
  canvas.dataset.drawn = String(Number(canvas.dataset.drawn || 0) + 1);
}

function drawAll() {
  for (const name of ['score', 'overlap', 'opacity']) $(`${name}-value`).textContent = Number($(name).value).toFixed(2);
  listClasses();
  chosen().forEach(draw);
}

// --- asking ---------------------------------------------------------------------------------------

function fail(view, error) {
  view.about.textContent = error.message;
  view.about.classList.add('error');
}

async function predict(model) {
  const view = views.get(model.name);
  const asked = round;
  Object.assign(view, { answer: null, attention: null, labels: null, masks: null });
  view.about.classList.remove('error');
  view.about.textContent = 'Predicting ...';
  view.buttons.hidden = view.canvas.hidden = true;
  view.list.replaceChildren();
  try {
    const answer = await ask(`/predict?model=${encodeURIComponent(model.name)}`, file);
    const picture = await load(answer.picture);
    let labels = null;
    if (answer.label_map) {
      const canvas = make('canvas', { width: answer.width, height: answer.height });
      const context = canvas.getContext('2d', { willReadFrequently: true });
      context.drawImage(await load(answer.label_map), 0, 0);
      labels = context.getImageData(0, 0, answer.width, answer.height).data;
    }
    const masks = answer.masks && await Promise.all(
      answer.masks.map(async (mask) => mask && { ...mask, image: await load(mask.picture) }));
    if (asked !== round) return;
    // A small image is enlarged, so that text in it is sharp.
    const scale = Math.max(1, Math.min(4, Math.round(1200 / Math.max(answer.width, answer.height))));
    Object.assign(view, { answer, picture, labels, masks, scale });
    Object.assign(view.canvas, { width: scale * answer.width, height: scale * answer.height });
    view.canvas.style.maxWidth = `calc(80vh * ${answer.width / answer.height})`;
    view.buttons.hidden = view.canvas.hidden = false;
    // Many labels would hide what they name.
    if (isBoxes(model) && shown(model, answer).length > CROWD) $('labels').checked = false;
    if (model.task === 'classification') {
      view.list.replaceChildren(...answer.annotations.map(({ name, score }) => make(
        'li', {}, make('span', { textContent: name }), make('meter', { value: score, title: name }), `${(100 * score).toFixed(1)} %`)));
    }
    drawAll();
  } catch (error) {
    if (asked === round) fail(view, error);
  }
}

function open(given) {
  if (!given) return;
  file = given;
  round += 1;
  hidden.clear();
  $('message').hidden = true;
  $('controls').hidden = $('results').hidden = false;
  $('forget').hidden = true;
  document.querySelector('#drop span').textContent = `${given.name} is shown; drop another to replace it`;
  chosen().forEach(predict);
}

async function attend(model, x, y) {
  const view = views.get(model.name);
  const asked = round;
  const block = $('block').value;
  const own = model.blocks.includes(block) ? block : model.blocks.at(-1);
  view.about.classList.remove('error');
  view.about.textContent = `Attention of block ${own} ...`;
  const wanted = view.wanted = {};
  try {
    const query = new URLSearchParams({ model: model.name, x, y, block: own });
    const { picture, text } = await ask(`/attention?${query}`, file);
    const image = await load(picture);
    if (asked !== round || view.wanted !== wanted) return;
    view.attention = { image, text, x, y, block: own };
    $('forget').hidden = false;
    draw(model);
  } catch (error) {
    if (asked === round && view.wanted === wanted) fail(view, error);
  }
}

// --- downloads ------------------------------------------------------------------------------------

function save(name, blob) {
  const link = make('a', { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function saveJson(model) {
  const { answer } = views.get(model.name);
  const found = isBoxes(model)
    ? shown(model, answer).map((i) => answer.annotations[i])
    : answer.annotations.filter(({ name }) => !hidden.has(name));
  const content = {
    info: { model: model.name, score: Number($('score').value), overlap: model.overlap === null ? null : Number($('overlap').value) },
    licenses: [],
    categories: model.classes.map((name, i) => ({ id: i + 1, name })),
    images: [{ id: 1, file_name: file.name, width: answer.width, height: answer.height }],
    annotations: found.map((annotation, i) => ({ id: i + 1, image_id: 1, ...annotation })),
  };
  save(`${stem()}_${model.name}.json`, new Blob([JSON.stringify(content)], { type: 'application/json' }));
}

const stem = () => file.name.replace(/\.[^.]*$/, '');

// --- the page -------------------------------------------------------------------------------------

function addCard(model) {
  const canvas = make('canvas', { hidden: true });
  const about = make('p', { className: 'about' });
  const list = make('ul', { className: 'answers' });
  const json = make('button', { type: 'button', textContent: 'JSON', onclick: () => saveJson(model) });
  const png = make('button', {
    type: 'button',
    textContent: 'Picture',
    onclick: () => canvas.toBlob((blob) => save(`${stem()}_${model.name}.png`, blob)),
  });
  const buttons = make('span', { hidden: true }, json, ' ', png);
  const head = make('div', { className: 'head' }, make('h2', { textContent: model.name }), buttons);
  const card = make('article', {}, head, about, canvas, list);
  card.dataset.model = model.name;
  if (model.blocks.length) {
    canvas.classList.add('clickable');
    canvas.title = 'Click to see what this point attends to';
    canvas.onclick = (event) => {
      const box = canvas.getBoundingClientRect();
      const { width, height } = views.get(model.name).answer;
      const x = ((event.clientX - box.left) * width) / box.width;
      const y = ((event.clientY - box.top) * height) / box.height;
      attend(model, x, y);
    };
  }
  views.set(model.name, { card, canvas, about, list, buttons });
  $('results').append(card);
}

function addControls() {
  for (const [name, is] of Object.entries({
    boxes: models.some(isBoxes),
    overlap: models.some((m) => m.overlap !== null),
    painted: models.some((m) => m.task === 'instance' || m.task === 'segmentation'),
    attention: models.some((m) => m.blocks.length),
  })) document.querySelectorAll(`#controls .${name}`).forEach((element) => { element.dataset.used = is; element.hidden ||= !is; });
  const overlaps = models.filter((m) => m.overlap !== null);
  if (overlaps.length) {
    $('overlap').max = Math.max(...overlaps.map((m) => m.most_overlap));
    $('overlap').value = overlaps[0].overlap;
  }
  const blocks = [...new Set(models.flatMap((m) => m.blocks))].sort();
  $('block').append(...blocks.map((block) => make('option', { textContent: block, value: block })));
  $('block').value = blocks.filter((block) => block.startsWith('3.')).at(-1) || blocks.at(-1) || '';
  if (models.length > 1) {
    $('models').hidden = false;
    $('models').append(...models.map((m) => make('label', {}, make('input', { type: 'checkbox', value: m.name, checked: true }), m.name)));
  }
}

$('file').onchange = () => {
  open($('file').files[0]);
  $('file').value = ''; // the same file, changed meanwhile, can be chosen again
};
for (const name of ['score', 'overlap', 'opacity', 'labels']) $(name).oninput = drawAll;
$('forget').onclick = () => {
  views.forEach((view) => { view.attention = null; view.wanted = null; });
  $('forget').hidden = true;
  drawAll();
};
$('block').onchange = () => {
  for (const model of chosen()) {
    const { attention } = views.get(model.name);
    if (attention) attend(model, attention.x, attention.y);
  }
};
$('classes').onchange = ({ target }) => {
  if (target.checked) hidden.delete(target.value);
  else hidden.add(target.value);
  drawAll();
};
$('models').onchange = () => {
  const used = new Set(chosen().map((m) => m.name));
  for (const model of models) {
    const view = views.get(model.name);
    view.card.hidden = !used.has(model.name);
    if (file && used.has(model.name) && !view.answer) predict(model);
  }
  drawAll();
};
for (const type of ['dragover', 'dragleave', 'drop']) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    $('drop').classList.toggle('over', type === 'dragover');
    if (type === 'drop') open(event.dataTransfer.files[0]);
  });
}
document.addEventListener('paste', (event) => open(event.clipboardData.files[0]));

ask('/models').then((found) => {
  models = found;
  models.forEach(addCard);
  addControls();
  $('message').textContent = `${models.map((m) => m.name).join(', ')}: ready.`;
}).catch((error) => { $('message').textContent = error.message; });
