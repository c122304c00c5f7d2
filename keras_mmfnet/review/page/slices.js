// Slices of volumes on a canvas: geometry and pixels, without the page. Voxels are (x, y, z), with x to the patient's left,
// y to the back and z to the head; arrays have x fastest.

// Of each plane: the axes to the right, down and across, and whether down is towards lower voxels.
export const PLANES = {
  axial: { right: 0, down: 1, across: 2, flipped: false, sides: ['R', 'L', 'A', 'P'] },
  coronal: { right: 0, down: 2, across: 1, flipped: true, sides: ['R', 'L', 'S', 'I'] },
  sagittal: { right: 1, down: 2, across: 0, flipped: true, sides: ['A', 'P', 'S', 'I'] }
}

// The array of an uncompressed NIfTI file in the byte order of this machine.
export function parseNifti (buffer) {
  const header = new DataView(buffer)
  const types = { 2: Uint8Array, 4: Int16Array, 16: Float32Array }
  const type = types[header.getInt16(70, true)]
  if (header.getInt32(0, true) !== 348 || !type) throw new Error(`a NIfTI file of 8, 16 or 32 bits is expected. Received: type ${header.getInt16(70, true)}`)
  return new type(buffer, header.getFloat32(108, true))
}

// The geometry of a slice: where its first voxel is in the array and the steps to the right and down.
export function sliceOf (plane, size, index) {
  const { right, down, across, flipped } = PLANES[plane]
  const steps = [1, size[0], size[0] * size[1]]
  const rows = size[down]
  return {
    width: size[right],
    height: rows,
    first: index * steps[across] + (flipped ? (rows - 1) * steps[down] : 0),
    right: steps[right],
    down: flipped ? -steps[down] : steps[down]
  }
}

// Values from black to white, from 1% to 99.5% of a sample.
export function windowOf (values) {
  const sample = []
  for (let i = 0, step = Math.max(1, Math.floor(values.length / 40000)); i < values.length; i += step) sample.push(values[i])
  sample.sort((a, b) => a - b)
  const low = sample[Math.floor(0.01 * (sample.length - 1))]
  const high = sample[Math.floor(0.995 * (sample.length - 1))]
  return [low, high > low ? high : low + 1]
}

// The image of a slice, with the layers over it: each gives colour and opacity for a value as `lookup`, 256 x RGBA.
export function paint (image, slice, values, [low, high], layers) {
  const pixels = image.data
  const scale = 255 / (high - low)
  let pixel = 0
  for (let row = 0; row < slice.height; row++) {
    let voxel = slice.first + row * slice.down
    for (let column = 0; column < slice.width; column++, voxel += slice.right, pixel += 4) {
      const grey = (values[voxel] - low) * scale // clamped by the array
      let r = grey
      let g = grey
      let b = grey
      for (let n = 0; n < layers.length; n++) {
        const layer = layers[n]
        const value = layer.array[voxel]
        if (!value) continue
        const at = 4 * Math.min(255, Math.round(value * layer.scale))
        const share = layer.lookup[at + 3] * layer.opacity / 255
        r = Math.min(r, 255) * (1 - share) + layer.lookup[at] * share
        g = Math.min(g, 255) * (1 - share) + layer.lookup[at + 1] * share
        b = Math.min(b, 255) * (1 - share) + layer.lookup[at + 2] * share
      }
      pixels[pixel] = r
      pixels[pixel + 1] = g
      pixels[pixel + 2] = b
      pixels[pixel + 3] = 255
    }
  }
}

// The edges between the voxels of some classes and the others in a slice, as a path in voxels from the upper left corner;
// `null` where there is none of them. `inside` tells for each class.
export function outline (slice, array, inside) {
  const { width, height } = slice
  const across = width + 2 // with a rim, which is outside
  const found = new Uint8Array(across * (height + 2))
  let any = false
  for (let row = 0; row < height; row++) {
    let voxel = slice.first + row * slice.down
    for (let column = 0, at = (row + 1) * across + 1; column < width; column++, voxel += slice.right, at++) {
      if (inside[array[voxel]]) any = found[at] = 1
    }
  }
  if (!any) return null
  const path = new Path2D()
  const run = (count, edge, line) => {
    for (let n = 0, begun = -1; n <= count; n++) {
      if (edge(n)) {
        if (begun < 0) begun = n
      } else if (begun >= 0) {
        line(begun, n)
        begun = -1
      }
    }
  }
  for (let row = 0; row <= height; row++) {
    const at = (row + 1) * across + 1
    run(width, (n) => found[at + n] !== found[at + n - across], (a, b) => { path.moveTo(a, row); path.lineTo(b, row) })
  }
  for (let column = 0; column <= width; column++) {
    const at = across + column + 1
    run(height, (n) => found[at + n * across] !== found[at + n * across - 1], (a, b) => { path.moveTo(column, a); path.lineTo(column, b) })
  }
  return path
}

// How a slice lies on a canvas: pixels of the canvas for a voxel to the right and down, and of the upper left corner.
// `centre` is the voxel in the middle of the canvas, and `zoom` 1 where the whole slice fits.
export function placement (plane, size, spacing, canvas, zoom, centre) {
  const { right, down, flipped } = PLANES[plane]
  const [width, height] = [size[right] * spacing[right], size[down] * spacing[down]]
  const scale = zoom * Math.min(canvas.width / width, canvas.height / height)
  const [x, y] = [scale * spacing[right], scale * spacing[down]]
  const row = flipped ? size[down] - 1 - centre[down] : centre[down]
  return { x, y, left: canvas.width / 2 - x * (centre[right] + 0.5), top: canvas.height / 2 - y * (row + 0.5) }
}

// The voxel at a point of the canvas, with fractions; `cursor` gives the slice.
export function voxelAt (plane, size, place, point, cursor) {
  const { right, down, flipped } = PLANES[plane]
  const voxel = [...cursor]
  voxel[right] = (point[0] - place.left) / place.x - 0.5
  const row = (point[1] - place.top) / place.y - 0.5
  voxel[down] = flipped ? size[down] - 1 - row : row
  return voxel
}

// The point of the canvas at the middle of a voxel, the inverse of `voxelAt`.
export function pointAt (plane, size, place, voxel) {
  const { right, down, flipped } = PLANES[plane]
  const row = flipped ? size[down] - 1 - voxel[down] : voxel[down]
  return [place.left + place.x * (voxel[right] + 0.5), place.top + place.y * (row + 0.5)]
}

const clamped = (low, value, high) => Math.min(Math.max(value, low), high)

// The voxels of a slice within a distance in mm of the line from one voxel to another: their indices in the array.
export function disc (plane, size, spacing, from, to, radius) {
  const { right, down, across } = PLANES[plane]
  const steps = [1, size[0], size[0] * size[1]]
  const base = Math.round(to[across]) * steps[across]
  const [ax, ay] = [from[right] * spacing[right], from[down] * spacing[down]]
  const [bx, by] = [to[right] * spacing[right], to[down] * spacing[down]]
  const length = (bx - ax) ** 2 + (by - ay) ** 2
  const range = (axis, a, b) => [clamped(0, Math.floor((Math.min(a, b) - radius) / spacing[axis]), size[axis]), clamped(-1, Math.ceil((Math.max(a, b) + radius) / spacing[axis]), size[axis] - 1)]
  const [columns, rows] = [range(right, ax, bx), range(down, ay, by)]
  const nearest = (axis, value) => Math.round(value[axis])
  const found = []
  for (let row = rows[0]; row <= rows[1]; row++) {
    for (let column = columns[0]; column <= columns[1]; column++) {
      const [px, py] = [column * spacing[right], row * spacing[down]]
      const share = length ? clamped(0, ((px - ax) * (bx - ax) + (py - ay) * (by - ay)) / length, 1) : 0
      const distance = (px - ax - share * (bx - ax)) ** 2 + (py - ay - share * (by - ay)) ** 2
      // The voxel under the pointer, however small the brush is.
      if (distance <= radius * radius || (column === nearest(right, to) && row === nearest(down, to))) found.push(base + column * steps[right] + row * steps[down])
    }
  }
  return found
}

// The voxels of a slice inside a closed line through some voxels, by the even-odd rule: their indices in the array.
export function polygon (plane, size, points) {
  const { right, down, across } = PLANES[plane]
  const steps = [1, size[0], size[0] * size[1]]
  const base = Math.round(points[0][across]) * steps[across]
  const found = []
  for (let row = 0; row < size[down]; row++) {
    const crossings = []
    points.forEach((one, n) => {
      const other = points[(n + 1) % points.length]
      if ((one[down] > row) !== (other[down] > row)) crossings.push(one[right] + (row - one[down]) / (other[down] - one[down]) * (other[right] - one[right]))
    })
    crossings.sort((a, b) => a - b)
    for (let n = 0; n + 1 < crossings.length; n += 2) {
      for (let column = clamped(0, Math.ceil(crossings[n]), size[right]); column <= Math.min(crossings[n + 1], size[right] - 1); column++) found.push(base + column * steps[right] + row * steps[down])
    }
  }
  return found
}
