// The page of `mmfnet review`: all sequences of a patient side by side, and one drawing on them.
import { PLANES, disc, outline, paint, parseNifti, placement, pointAt, polygon, sliceOf, voxelAt, windowOf } from './slices.js'

const COLOURS = [[255, 99, 71], [80, 200, 255], [255, 214, 61], [124, 252, 120], [220, 130, 255], [255, 160, 60], [120, 255, 220], [255, 130, 190]]
const VIEWS = { axial: ['axial'], coronal: ['coronal'], sagittal: ['sagittal'], 'three planes': Object.keys(PLANES), '3D': [] }
const TOOLS = { look: 'Look', brush: 'Brush', erase: 'Erase', fill: 'Fill' }
const STEPS_BACK = 200
const $ = (id) => document.getElementById(id)

// What is shown. `drawing` has the class of each voxel; `strokes` is how many were drawn since the last version.
const page = { patients: [], order: [], about: null, volumes: [], panes: [], drawing: null, strokes: 0, undo: [], cursor: [0, 0, 0], centre: [0, 0, 0], zoom: 1, view: 'axial', structure: 0, tool: 'look', hidden: false }
window.review = page

// --- the server

async function ask (path, options) {
  const answer = await fetch(`api/${path}`, options)
  if (answer.ok) return answer
  const text = await answer.text()
  let about = text
  try { about = JSON.parse(text).error } catch { /* it is plain text */ }
  throw Object.assign(new Error(about), { status: answer.status })
}

// What is to be sent, one after the other. Each answer tells the state of the drawing, which the next one refers to.
const queue = []
let sent = Promise.resolve() // rejected if the server refused something
let sending = sent // ends in either case

function post (path, body, done = () => {}) {
  const { about } = page
  queue.push({ about, path, body, done })
  if (queue.length === 1) {
    sent = sendAll()
    sending = sent.catch(() => {})
  }
  return sent
}

async function sendAll () {
  while (queue.length) {
    const { about, path, body, done } = queue[0]
    try {
      const answer = await ask(`patients/${about.id}/${path}?after=${about.state_of_drawing}`, { method: 'POST', body })
      const found = await answer.json()
      about.state_of_drawing = found.state
      queue.shift()
      done(found)
    } catch (error) {
      if (error.status) {
        queue.length = 0
        throw new Error(error.status === 404
          ? 'Not kept; mmfnet review was started again: open the address that it printed.'
          : `Not kept; reload the page. ${error.message}`)
      }
      say('The server does not answer; trying again. What was drawn is not kept yet.', true)
      await new Promise((resolve) => setTimeout(resolve, 2000))
      if (queue.length) say('Sending')
    }
  }
}

window.addEventListener('beforeunload', (event) => { if (queue.length || current) event.preventDefault() })

const volume = async (id, path) => parseNifti(await (await ask(`patients/${id}/${path}.nii`)).arrayBuffer())

function say (text, error = false) {
  $('message').textContent = text
  $('message').classList.toggle('error', error)
}

function complain (error) {
  console.error(error)
  say(error.message, true)
}

const acting = (act) => (...given) => { Promise.resolve(act(...given)).catch(complain) }

// --- the list

const known = (row, key) => Object.values(row.scores).map((one) => one[key]).filter((value) => typeof value === 'number')
const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : undefined)
const fixed = (value, digits) => (value === undefined ? '' : value.toFixed(digits))
const size = (row) => mean(known(row, 'corrected_ml').length ? known(row, 'corrected_ml') : known(row, 'predicted_ml'))
const COLUMNS = {
  patient: (row) => row.name,
  DSC: (row) => fixed(mean(known(row, 'dsc')), 3),
  disagreement: (row) => fixed(mean(known(row, 'disagreement')), 3),
  ml: (row) => fixed(size(row), 1),
  state: (row) => row.state + (row.unsaved ? ' *' : '')
}

// The worst first: by DSC, and by disagreement where there is no expert's mask.
function worse (a, b) {
  const [x, y] = [a, b].map((row) => mean(known(row, 'dsc')) ?? 2)
  const [v, w] = [a, b].map((row) => mean(known(row, 'disagreement')) ?? 0)
  return x - y || w - v || a.name.localeCompare(b.name)
}

const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties)
  element.append(...children)
  return element
}

function list () {
  const columns = Object.keys(COLUMNS).filter((name) => page.patients.some((row) => COLUMNS[name](row)))
  const kind = (name) => (['patient', 'state'].includes(name) ? '' : 'number')
  $('columns').replaceChildren(...columns.map((name) => make('th', { textContent: name, scope: 'col', className: kind(name) })))
  const wanted = $('filter').value
  page.order = page.patients.filter((row) => !wanted || row.state === wanted).sort(worse).map((row) => row.id)
  $('patients').replaceChildren(...page.order.map((id) => {
    const row = page.patients[id]
    const cells = columns.map((name) => {
      const text = COLUMNS[name](row)
      return name === 'patient' ? make('td', {}, make('button', { type: 'button', textContent: text })) : make('td', { textContent: text, className: kind(name) })
    })
    const line = make('tr', { onclick: acting(() => open(id)) }, ...cells)
    line.dataset.id = id
    return line
  }))
  mark()
}

function mark () {
  for (const line of $('patients').children) {
    const chosen = Number(line.dataset.id) === page.about?.id
    line.setAttribute('aria-current', chosen)
    if (chosen) line.scrollIntoView({ block: 'nearest' })
  }
}

function step (by) {
  const place = page.order.indexOf(page.about?.id)
  const next = page.order[place < 0 ? 0 : place + by]
  return next === undefined ? say('There is no further patient') : open(next)
}

let opening = 0
async function open (id) {
  const ticket = ++opening
  finish()
  await sending
  say('Loading')
  const begun = performance.now()
  const about = await (await ask(`patients/${id}`)).json()
  const arrays = await Promise.all(about.sequences.map((name) => volume(id, `images/${name}`)))
  let drawing
  let classes
  do { // with what is drawn meanwhile, if it is the patient who is shown already
    if (ticket !== opening) return // another patient was chosen
    finish()
    await sending
    drawing = await ask(`patients/${id}/drawing`)
    classes = new Uint8Array(await drawing.arrayBuffer())
  } while (ticket !== opening || current || queue.length)
  page.volumes = about.sequences.map((name, n) => ({ name, array: arrays[n], window: windowOf(arrays[n]) }))
  about.state_of_drawing = drawing.headers.get('X-State')
  page.drawing = classes
  page.strokes = Number(drawing.headers.get('X-Strokes'))
  about.size = [...about.shape].reverse()
  Object.assign(page, { about, undo: [], zoom: 1, structure: Math.min(page.structure, about.structures.length - 1) })
  layers.clear()
  showTools()
  showOverlays()
  setView(page.view)
  centre()
  mark()
  await Promise.all(Object.keys(overlays).map(load))
  if (ticket !== opening) return
  say(`${about.name}: ${about.sequences.join(', ')}`)
  page.seconds = (performance.now() - begun) / 1000
}

// --- the views

function setView (view) {
  finish()
  page.view = view
  check('planes', view)
  const planes = VIEWS[view]
  const sequences = page.volumes
  page.panes = planes.length ? sequences.flatMap((one) => planes.map((plane) => makePane(one, plane))) : []
  const columns = planes.length > 1 ? planes.length : Math.ceil(Math.sqrt(sequences.length))
  const rows = planes.length > 1 ? sequences.length : Math.ceil(sequences.length / columns)
  $('views').style.gridTemplate = `repeat(${rows}, minmax(0, 1fr)) / repeat(${columns}, minmax(0, 1fr))`
  $('views').replaceChildren(...page.panes.map((pane) => pane.box))
  if (!planes.length) acting(show3D)()
  draw()
}

function makePane (one, plane) {
  const canvas = make('canvas', { tabIndex: 0 })
  canvas.setAttribute('role', 'img')
  const title = make('span', { textContent: page.view === 'three planes' ? `${one.name}, ${plane}` : one.name })
  const pane = { volume: one, plane, canvas, box: make('div', { className: 'view' }, title, canvas), buffer: document.createElement('canvas') }
  listen(pane)
  return pane
}

let due = false
function draw () {
  if (due) return
  due = true
  requestAnimationFrame(() => {
    due = false
    for (const pane of page.panes) drawPane(pane)
    showPlace()
  })
}

function drawPane (pane) {
  const { about, cursor } = page
  const { canvas, buffer, plane } = pane
  const { across } = PLANES[plane]
  const ratio = window.devicePixelRatio
  const [width, height] = [canvas.clientWidth, canvas.clientHeight].map((length) => Math.max(1, Math.round(length * ratio)))
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height })
  const slice = sliceOf(plane, about.size, cursor[across])
  if (buffer.width !== slice.width || buffer.height !== slice.height) {
    Object.assign(buffer, { width: slice.width, height: slice.height })
    pane.image = new ImageData(slice.width, slice.height)
  }
  const filled = overlays.drawing.on && !page.hidden ? [{ array: page.drawing, lookup: colours(), scale: 1, opacity: overlays.drawing.opacity }] : []
  const shown = page.hidden ? [] : [...layers].filter(([key]) => overlays[key].on)
  const maps = shown.filter(([key]) => key.startsWith('maps')).map(([key, array]) => ({ array, lookup: HEAT, scale: key.includes('disagreement') ? 510 : 255, opacity: overlays[key].opacity }))
  paint(pane.image, slice, pane.volume.array, pane.volume.window, [...maps, ...filled])
  buffer.getContext('2d').putImageData(pane.image, 0, 0)
  const context = canvas.getContext('2d')
  context.setTransform(1, 0, 0, 1, 0, 0)
  context.fillStyle = '#000'
  context.fillRect(0, 0, width, height)
  const place = pane.place = placement(plane, about.size, about.spacing, canvas, page.zoom, page.centre)
  context.imageSmoothingEnabled = true
  context.drawImage(buffer, place.left, place.top, place.x * slice.width, place.y * slice.height)
  const contours = shown.filter(([key]) => key.startsWith('masks')).map(([key, array]) => [array, overlays[key].opacity, key.endsWith('expert') ? [6, 4] : [2, 3]])
  if (filled.length) contours.push([page.drawing, Math.min(1, overlays.drawing.opacity * 3), []])
  for (const [array, opacity, dash] of contours) {
    about.structures.forEach((_, number) => {
      const path = outline(slice, array, about.members.map((members) => members[number]))
      if (path) stroke(context, path, place, COLOURS[number % COLOURS.length], opacity, dash.map((length) => length * ratio), ratio)
    })
  }
  if (pane.path?.length > 1) {
    const line = new Path2D()
    for (const voxel of pane.path) line.lineTo(...pointAt(plane, about.size, place, voxel))
    context.setLineDash([])
    context.strokeStyle = '#ffd24a'
    context.lineWidth = 2 * ratio
    context.stroke(line)
  }
  cross(context, place, plane)
  letters(context, plane, width, height, ratio)
  canvas.setAttribute('aria-label', `${pane.volume.name}, ${plane} slice ${cursor[across] + 1} of ${about.size[across]}`)
}

function stroke (context, path, place, colour, opacity, dash, ratio) {
  const scaled = new Path2D()
  scaled.addPath(path, new DOMMatrix([place.x, 0, 0, place.y, place.left, place.top]))
  context.setLineDash(dash)
  context.lineWidth = 1.5 * ratio
  context.strokeStyle = `rgb(${colour.join(' ')} / ${opacity})`
  context.stroke(scaled)
}

// Where the cursor is, with a gap so that it hides nothing.
function cross (context, place, plane) {
  const [x, y] = pointAt(plane, page.about.size, place, page.cursor)
  context.setLineDash([])
  context.lineWidth = 1
  context.strokeStyle = 'rgb(255 210 74 / 70%)'
  context.beginPath()
  for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
    context.moveTo(x + 12 * dx, y + 12 * dy)
    context.lineTo(x + 32 * dx, y + 32 * dy)
  }
  context.stroke()
}

function letters (context, plane, width, height, ratio) {
  const [left, right, top, bottom] = PLANES[plane].sides
  context.fillStyle = '#d5dde3'
  context.font = `${13 * ratio}px sans-serif`
  context.textAlign = 'center'
  context.textBaseline = 'middle'
  const edge = 10 * ratio
  for (const [text, x, y] of [[left, edge, height / 2], [right, width - edge, height / 2], [top, width / 2, edge], [bottom, width / 2, height - edge]]) context.fillText(text, x, y)
}

async function show3D () {
  const { about } = page
  const canvas = make('canvas', { tabIndex: 0 })
  canvas.setAttribute('aria-label', `${page.volumes[0].name} and the saved masks, in three dimensions`)
  $('views').style.gridTemplate = '1fr / 1fr'
  $('views').replaceChildren(make('div', { className: 'view' }, make('span', { textContent: `${page.volumes[0].name}; drag to turn` }), canvas))
  say('Loading three dimensions')
  const { Niivue, cmapper } = await import('./niivue.js')
  const nv = new Niivue({ dragAndDropEnabled: false, loadingText: '', logLevel: 'error', clipPlaneHotKey: '', cycleClipPlaneHotKey: '', viewModeHotKey: '' })
  await nv.attachToCanvas(canvas)
  const left = () => page.about !== about || page.view !== '3D'
  if (left()) return
  nv.setSliceType(nv.sliceTypeRender)
  await nv.loadVolumes([{ url: `api/patients/${about.id}/images/${about.sequences[0]}.nii`, opacity: 0.3 }])
  const lookup = { R: [0], G: [0], B: [0], A: [0], labels: ['none'] }
  about.members.slice(1).forEach((members, n) => {
    const [r, g, b] = colour(members)
    lookup.R.push(r); lookup.G.push(g); lookup.B.push(b); lookup.A.push(255); lookup.labels.push(`${n + 1}`)
  })
  nv.drawLut = cmapper.makeDrawLut(lookup)
  await nv.loadDrawingFromUrl(`api/patients/${about.id}/masks/drawn.nii`)
  if (left()) return
  page.nv = nv
  say(about.name)
}

// --- overlays

const overlays = { drawing: { on: true, opacity: 0.3 } }
const layers = new Map() // the arrays that are loaded, by what they show
const HEAT = new Uint8ClampedArray(1024)
for (let n = 0; n < 256; n++) HEAT.set([3 * n, 3 * (n - 85), 3 * (n - 170), n < 5 ? 0 : 255], 4 * n)
const colour = (members) => COLOURS[members.lastIndexOf(true) % COLOURS.length]

function colours () {
  const found = new Uint8ClampedArray(1024)
  page.about.members.forEach((members, n) => { if (n) found.set([...colour(members), 255], 4 * n) })
  return found
}

function overlayNames () {
  const { about } = page
  const several = about.structures.length > 1
  return {
    drawing: 'Drawing (solid line)',
    'masks/predicted': 'Predicted (dotted)',
    ...(about.expert ? { 'masks/expert': "Expert's (dashed)" } : {}),
    ...Object.fromEntries(about.maps.map(([what, name]) => [`maps/${what}/${name}`, `${what[0].toUpperCase()}${what.slice(1)}${several ? `, ${name}` : ''}`]))
  }
}

function showOverlays () {
  const names = overlayNames()
  for (const key of Object.keys(overlays)) if (!(key in names)) delete overlays[key]
  $('overlays').replaceChildren(...Object.entries(names).map(([key, text]) => {
    overlays[key] ??= { on: key === 'masks/expert', opacity: key.startsWith('maps') ? 0.5 : 1 }
    const box = make('input', { type: 'checkbox', checked: overlays[key].on, onchange: () => { overlays[key].on = box.checked; acting(load)(key) } })
    const slider = make('input', { type: 'range', min: 0, max: 1, step: 0.05, value: overlays[key].opacity, oninput: () => { overlays[key].opacity = Number(slider.value); draw() } })
    slider.setAttribute('aria-label', `Opacity: ${text}`)
    const row = make('div', {}, make('label', { className: 'choice' }, box, text), slider)
    row.dataset.key = key
    return row
  }))
}

async function load (key) {
  const { id } = page.about
  if (key !== 'drawing' && overlays[key].on && !layers.has(key)) {
    const before = $('message').textContent
    say('Loading')
    const array = await volume(id, key)
    if (page.about.id !== id) return
    say(before)
    layers.set(key, array)
  }
  draw()
}

const toggle = (key) => [...$('overlays').children].find((row) => row.dataset.key === key)?.querySelector('[type=checkbox]').click()

// --- position

const plane = () => VIEWS[page.view][0] ?? 'axial'

// To the middle of the slice with most of the drawing, or of the volume.
function centre () {
  const { size: [nx, ny, nz] } = page.about
  const count = new Float64Array(nz)
  page.drawing.forEach((value, voxel) => { if (value) count[Math.floor(voxel / (nx * ny))]++ })
  const most = count.indexOf(Math.max(...count))
  const middle = [nx >> 1, ny >> 1, nz >> 1]
  if (count[most]) {
    let [x, y] = [0, 0]
    for (let n = 0, first = most * nx * ny; n < nx * ny; n++) if (page.drawing[first + n]) { x += n % nx; y += Math.floor(n / nx) }
    middle.splice(0, 3, Math.round(x / count[most]), Math.round(y / count[most]), most)
  }
  page.centre = page.zoom > 1 ? [...middle] : [nx, ny, nz].map((n) => (n - 1) / 2)
  go(middle)
}

function go (voxel) {
  page.cursor = voxel.map((value, axis) => Math.min(Math.max(Math.round(value), 0), page.about.size[axis] - 1))
  // The cursor does not leave what is seen.
  if (page.zoom > 1) page.centre[PLANES[plane()].across] = page.cursor[PLANES[plane()].across]
  draw()
}

function move (axis, by) {
  const voxel = [...page.cursor]
  voxel[axis] += by
  go(voxel)
}

// The key of an arrow moves the cursor in the plane as it is seen.
function shift (x, y) {
  const { right, down, flipped } = PLANES[plane()]
  const voxel = [...page.cursor]
  voxel[right] += x
  voxel[down] += flipped ? -y : y
  go(voxel)
}

function zoom (factor, around = page.cursor) {
  const next = Math.min(Math.max(page.zoom * factor, 1), 30)
  const fitting = page.about.size.map((n) => (n - 1) / 2)
  page.centre = next === 1 ? fitting : page.centre.map((value, axis) => around[axis] + (value - around[axis]) * page.zoom / next)
  page.zoom = next
  draw()
}

function showPlace () {
  const { about, cursor, drawing } = page
  if (!about) return
  const { across } = PLANES[plane()]
  const names = about.structures.filter((_, n) => about.members[drawing[cursor[0] + about.size[0] * (cursor[1] + about.size[1] * cursor[2])]][n])
  const mm = [0, 1, 2].map((row) => about.origin[row] + [0, 1, 2].reduce((sum, axis) => sum + about.axes[row][axis] * cursor[axis], 0))
  $('place').textContent = `Slice ${cursor[across] + 1} of ${about.size[across]}; ${mm.map((value) => value.toFixed(1)).join(', ')} mm${names.map((name) => `; ${name}`).join('')}`
}

// --- the mouse

function listen (pane) {
  const { canvas } = pane
  // In pixels of the canvas as it was drawn.
  const point = (event) => [event.offsetX * canvas.width / canvas.clientWidth, event.offsetY * canvas.height / canvas.clientHeight]
  const voxel = (event) => voxelAt(pane.plane, page.about.size, pane.place, point(event), page.cursor)
  let last = null
  let act = null
  let pointer = null
  canvas.addEventListener('contextmenu', (event) => event.preventDefault())
  canvas.addEventListener('wheel', (event) => {
    event.preventDefault()
    if (event.ctrlKey) zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2, voxel(event))
    else move(PLANES[pane.plane].across, event.deltaY < 0 ? 1 : -1)
  }, { passive: false })
  canvas.addEventListener('pointerdown', (event) => {
    if (pointer !== null) return // one finger draws
    pointer = event.pointerId
    canvas.setPointerCapture(pointer)
    act = event.button === 2 ? 'window' : event.button === 1 || event.shiftKey ? 'pan' : page.tool
    last = voxel(event)
    pane.from = point(event)
    if (act === 'look') go(last)
    if (act === 'brush' || act === 'erase') {
      begin(act === 'erase')
      brush(pane.plane, last, last)
    }
    if (act === 'fill') pane.path = [last]
  })
  canvas.addEventListener('pointermove', (event) => {
    if (event.pointerId !== pointer) return
    const now = voxel(event)
    if (act === 'look') go(now)
    if (current && (act === 'brush' || act === 'erase')) brush(pane.plane, last, now)
    if (act === 'fill') {
      now[PLANES[pane.plane].across] = pane.path[0][PLANES[pane.plane].across] // the slice where it was begun
      pane.path.push(now)
      draw()
    }
    if (act === 'pan') {
      const { right, down } = PLANES[pane.plane]
      for (const axis of [right, down]) page.centre[axis] -= now[axis] - last[axis]
      draw()
    }
    if (act === 'window') {
      const [x, y] = point(event)
      const [low, high] = pane.volume.window
      const width = Math.max((high - low) * Math.exp((x - pane.from[0]) / 300), 1e-6)
      const level = (low + high) / 2 + (y - pane.from[1]) * (high - low) / 300
      pane.volume.window = [level - width / 2, level + width / 2]
      pane.from = [x, y]
      draw()
    }
    last = act === 'pan' ? last : now
  })
  const end = (event) => {
    if (event.pointerId !== pointer) return
    pointer = null
    finish()
    if (act === 'fill' && page.panes.includes(pane)) { // not of a patient or view that was left
      begin(false)
      touch(polygon(pane.plane, page.about.size, pane.path))
      finish()
    }
    pane.path = null
    act = null
  }
  for (const name of ['pointerup', 'pointercancel', 'lostpointercapture']) canvas.addEventListener(name, end)
}

// --- drawing

let current = null // the stroke that is being drawn: the voxels' values before, and what becomes of each class

function begin (erase) {
  finish()
  // What is drawn is seen.
  if (page.hidden || !overlays.drawing.on) {
    page.hidden = false
    if (!overlays.drawing.on) toggle('drawing')
  }
  current = { before: new Map(), table: page.about[erase ? 'erased' : 'drawn'][page.structure] }
}

function brush (where, from, to) {
  touch(disc(where, page.about.size, page.about.spacing, from, to, Number($('brush').value) / 2))
}

function touch (voxels) {
  for (const voxel of voxels) {
    if (current.before.has(voxel)) continue
    const value = page.drawing[voxel]
    if (current.table[value] === value) continue
    current.before.set(voxel, value)
    page.drawing[voxel] = current.table[value]
  }
  draw()
}

function finish () {
  if (!current) return
  const { before } = current
  current = null
  if (before.size) record(Uint32Array.from(before.keys()), Uint8Array.from(before.values()))
}

// Sends what was drawn, and keeps what was there before for undo.
function record (voxels, before) {
  page.undo.push([voxels, before])
  page.undo.splice(0, Math.max(0, page.undo.length - STEPS_BACK))
  send(voxels)
}

function send (voxels) {
  const body = new Uint8Array(4 + 5 * voxels.length)
  new DataView(body.buffer).setUint32(0, voxels.length, true)
  body.set(new Uint8Array(Uint32Array.from(voxels).buffer), 4)
  voxels.forEach((voxel, n) => { body[4 + 4 * voxels.length + n] = page.drawing[voxel] })
  page.strokes++
  page.patients[page.about.id].unsaved = true
  post('strokes', body).catch(complain)
  showVolumes()
  draw()
}

function undo () {
  finish()
  const last = page.undo.pop()
  if (!last) return
  const [voxels, before] = last
  voxels.forEach((voxel, n) => { page.drawing[voxel] = before[n] })
  send(voxels)
}

// Draws at the cursor, without the mouse.
function stamp (erase) {
  if (!page.panes.length) return say('Choose a view with slices to draw')
  begin(erase)
  brush(plane(), page.cursor, page.cursor)
  finish()
}

// What the server computes from the drawing.
async function compute (path) {
  finish()
  await sending
  say('Computing')
  const { about } = page
  const { state_of_drawing: state } = about
  const data = await (await ask(`patients/${about.id}/${path}`)).arrayBuffer()
  finish()
  if (page.about !== about || queue.length || about.state_of_drawing !== state) return say('The drawing was changed meanwhile; try again')
  const count = new DataView(data).getUint32(0, true)
  const voxels = new Uint32Array(data.slice(4, 4 + 4 * count))
  const before = voxels.map((voxel) => page.drawing[voxel])
  new Uint8Array(data, 4 + 4 * count).forEach((value, n) => { page.drawing[voxels[n]] = value })
  if (count) record(voxels, Uint8Array.from(before))
  say(`${count} voxels changed`)
  return count
}

async function interpolate () {
  if (await compute(`interpolated?structure=${page.structure}&axis=${2 - PLANES[plane()].across}`) === 0) say('0 voxels changed: no empty slice lies between drawn ones')
}
const grow = () => $('growing').hidden || compute(`grown?structure=${page.structure}&threshold=${$('threshold').value}`)

async function save () {
  finish()
  const { about } = page
  say('Saving')
  // What is shown must be what the server has.
  await post('save', JSON.stringify(page.classes), ({ row, strokes }) => {
    page.patients[about.id] = row
    if (page.about === about) {
      page.strokes = strokes + queue.filter((one) => one.path === 'strokes').length
      showVolumes()
    }
    list()
    say(`${row.name}: ${row.state}`)
  })
}

// --- the tools

function showTools () {
  $('structures').replaceChildren(...page.about.structures.map((name, number) => {
    const box = make('input', { type: 'radio', name: 'structure', checked: number === page.structure, onchange: () => { page.structure = number } })
    const swatch = make('span', { className: 'swatch' })
    swatch.style.background = `rgb(${COLOURS[number % COLOURS.length].join(' ')})`
    return make('label', { className: 'choice' }, box, swatch, name, make('span', { className: 'ml' }))
  }))
  $('growing').hidden = !page.about.maps.some(([what]) => what === 'probability')
  showVolumes()
}

function showVolumes () {
  const { about, drawing } = page
  const classes = page.classes = about.members.map(() => 0)
  for (let voxel = 0; voxel < drawing.length; voxel++) classes[drawing[voxel]]++
  const ml = about.spacing.reduce((a, b) => a * b) / 1000
  page.voxels = about.structures.map((_, n) => about.members.reduce((sum, members, value) => sum + members[n] * classes[value], 0))
  $('structures').querySelectorAll('.ml').forEach((cell, n) => { cell.textContent = `${(page.voxels[n] * ml).toFixed(2)} ml` })
  $('undo').disabled = !page.undo.length
  $('save').textContent = page.strokes ? 'Save' : 'Accept'
  $('save').classList.toggle('unsaved', page.strokes > 0)
}

function choose (number) {
  $('structures').querySelectorAll('input')[number]?.click()
}

function setTool (tool) {
  page.tool = tool
  check('tools', tool)
}

function resize (by) {
  $('brush').value = Number($('brush').value) + by
  $('brush').dispatchEvent(new Event('input'))
}

function check (group, value) {
  for (const button of $(group).children) button.setAttribute('aria-pressed', button.value === value)
}

function choices (group, names, act) {
  $(group).replaceChildren(...Object.entries(names).map(([value, textContent]) => make('button', { type: 'button', value, textContent, onclick: () => act(value) })))
}

// --- keys

const next = (names, name) => names[(names.indexOf(name) + 1) % names.length]
const KEYS = {
  n: ['Next patient', () => step(1)],
  p: ['Previous patient', () => step(-1)],
  ArrowUp: ['Next slice', () => move(PLANES[plane()].across, 1)],
  ArrowDown: ['Previous slice', () => move(PLANES[plane()].across, -1)],
  'Shift+ArrowLeft': ['Cursor to the left', () => shift(-1, 0)],
  'Shift+ArrowRight': ['Cursor to the right', () => shift(1, 0)],
  'Shift+ArrowUp': ['Cursor up', () => shift(0, -1)],
  'Shift+ArrowDown': ['Cursor down', () => shift(0, 1)],
  c: ['To the centre of the drawing', centre],
  v: ['Next view', () => setView(next(Object.keys(VIEWS), page.view))],
  '+': ['Zoom in', () => zoom(1.25)],
  '-': ['Zoom out', () => zoom(0.8)],
  h: ['Hide or show the overlays', () => { page.hidden = !page.hidden; draw() }],
  m: ['The drawing', () => toggle('drawing')],
  o: ['The predicted contour', () => toggle('masks/predicted')],
  e: ["The expert's contour", () => toggle('masks/expert')],
  l: ['Look', () => setTool('look')],
  b: ['Brush', () => setTool('brush')],
  x: ['Eraser', () => setTool('erase')],
  f: ['Fill: draw an outline', () => setTool('fill')],
  '[': ['Smaller brush', () => resize(-1)],
  ']': ['Larger brush', () => resize(1)],
  d: ['Draw at the cursor', () => stamp(false)],
  'Shift+D': ['Erase at the cursor', () => stamp(true)],
  i: ['Interpolate between drawn slices', interpolate],
  g: ['Grow from the probability', grow],
  u: ['Undo', undo],
  s: ['Save the drawing, or accept the masks', save]
}

window.addEventListener('keydown', (event) => {
  if ($('keys').open || event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === 'SELECT') return
  if (event.key.startsWith('Arrow') && event.target.tagName === 'INPUT') return
  const name = event.key.length > 1 || !event.shiftKey ? event.key : event.key.toUpperCase()
  const key = event.shiftKey && `Shift+${name}` in KEYS ? `Shift+${name}` : event.key
  const act = /^[1-9]$/.test(key) ? () => choose(Number(key) - 1) : key === '?' ? help : KEYS[key]?.[1]
  if (!act || !(page.about || key === '?')) return
  event.preventDefault()
  event.stopPropagation()
  if (event.repeat && !/Arrow|[-+u[\]]/.test(key)) return
  acting(act)()
}, true)

function help () {
  $('keys').showModal()
}

// --- the start

choices('planes', Object.fromEntries(Object.keys(VIEWS).map((name) => [name, name])), setView)
choices('tools', TOOLS, setTool)
setTool('look')
$('bindings').replaceChildren(...Object.entries({ ...KEYS, '1 to 9': ['A structure'], '?': ['This list'] }).map(([key, [text]]) => make('tr', {}, make('td', {}, make('kbd', { textContent: key })), make('td', { textContent: text }))))
for (const [id, act] of Object.entries({ previous: () => step(-1), next: () => step(1), save, undo, interpolate, grow, help })) $(id).addEventListener('click', acting(act))
$('filter').addEventListener('change', list)
for (const [id, text] of [['brush', (value) => `${value} mm`], ['threshold', (value) => Number(value).toFixed(2)]]) {
  const show = () => { $(`${id}_value`).textContent = text($(id).value) }
  $(id).addEventListener('input', show)
  show()
}
new ResizeObserver(draw).observe($('views'))
// The patient that an address of the report names, as in `#anna`.
const named = () => page.patients.find((row) => row.name === decodeURIComponent(location.hash.slice(1)))?.id
window.addEventListener('hashchange', acting(() => named() === undefined || open(named())))
acting(async () => {
  const found = await (await ask('patients')).json()
  page.patients = found.patients
  $('report').hidden = !found.report
  list()
  return page.order.length ? open(named() ?? page.order[0]) : say('There are no patients')
})()
