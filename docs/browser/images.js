// Pictures -> an encoder's pixels, as Pillow and torchvision make them for ClipCap's other captioners.
// A canvas would resize by another method, and the captions would be others.

import { Refused } from "./errors.js";

const MAX_RATIO = 100; // of the sides
const MAX_PIXELS = 178_956_970; // where Pillow refuses
const BITS = 22; // of the fraction in a weight; Pillow's PRECISION_BITS

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

// Pillow's filters: how far they reach and what a point at distance x, in output pixels or input ones, weighs
const FILTERS = {
  box: { reach: 0.5, weigh: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0) },
  bilinear: { reach: 1, weigh: (x) => Math.max(1 - Math.abs(x), 0) },
  hamming: { reach: 1, weigh: (x) => (Math.abs(x) < 1 ? sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)) : 0) },
  bicubic: { reach: 2, weigh: bicubic },
  lanczos: { reach: 3, weigh: (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0) },
};

function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/**
 * Read a picture upright, its transparency over white, its numbers as they are in the file (no colour profile).
 *
 * @param {Blob} file
 * @returns {Promise<{data: Uint8ClampedArray, width: number, height: number}>} RGBA, row by row.
 * @throws Refused where the browser cannot read it.
 */
export async function readPicture(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    throw new Refused(`${file.name || "this"} is no picture that this browser can read; try a JPEG or a PNG`);
  }
  const { width, height } = bitmap;
  try {
    if (Math.max(width, height) > MAX_RATIO * Math.min(width, height)) {
      throw new Refused(`the picture, ${width} × ${height} pixels, is more than ${MAX_RATIO} times as long as wide`);
    }
    if (width * height > MAX_PIXELS) {
      throw new Refused(`the picture has more than ${MAX_PIXELS.toLocaleString("en")} pixels; make it smaller`);
    }
    const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    context.fillStyle = "white";
    context.fillRect(0, 0, width, height);
    context.drawImage(bitmap, 0, 0);
    return { data: context.getImageData(0, 0, width, height).data, width, height };
  } catch (error) {
    if (error instanceof Refused) throw error;
    throw new Refused(`the picture, ${width} × ${height} pixels, is too large for this browser; make it smaller`);
  } finally {
    bitmap.close();
  }
}

/** A picture -> [3, H, W] pixels, as torchvision's Resize, CenterCrop, ToTensor and Normalize. */
export class Preprocess {
  /**
   * @param {object} said by captioner.json; `size`: of the shorter side, or [H, W]; size or crop may be null.
   * @throws Refused for an interpolation that is not Pillow's, or its nearest.
   */
  constructor({ size, interpolation, crop, mean, std }) {
    if (size && !FILTERS[interpolation]) {
      throw new Refused(`this page cannot resize pictures by ${interpolation}, as this captioner's encoder does`);
    }
    Object.assign(this, { size, crop, filter: FILTERS[interpolation] });
    // what each byte becomes, rounded to float32 after every operation as there
    this.values = mean.map((average, band) =>
      Float32Array.from({ length: 256 }, (_, byte) =>
        Math.fround(Math.fround(byte / 255) - Math.fround(average)) / Math.fround(std[band]),
      ),
    );
  }

  /**
   * @param {{data, width, height}} picture RGBA, of `readPicture`.
   * @returns {{data: Float32Array, dims: number[]}} [1, 3, H, W].
   */
  apply(picture) {
    let { width, height } = picture;
    if (Array.isArray(this.size)) {
      [height, width] = this.size;
    } else if (this.size) {
      const long = Math.trunc((this.size * Math.max(width, height)) / Math.min(width, height));
      [width, height] = width <= height ? [this.size, long] : [long, this.size];
    }
    const resized = resize(picture, width, height, this.filter);
    const [down, across] = this.crop ?? [height, width];
    return { data: this.cut(resized, down, across), dims: [1, 3, down, across] };
  }

  /** Return the numbers of a picture's middle; where it is smaller than that, it has a black frame. */
  cut({ data, width, height, bands }, down, across) {
    const [top, left] = [middle(height, down), middle(width, across)];
    const pixels = new Float32Array(3 * down * across);
    for (let band = 0, place = 0; band < 3; band++) {
      for (let y = top; y < top + down; y++) {
        for (let x = left; x < left + across; x++, place++) {
          const inside = y >= 0 && y < height && x >= 0 && x < width;
          pixels[place] = this.values[band][inside ? data[(y * width + x) * bands + band] : 0];
        }
      }
    }
    return pixels;
  }
}

/** Return where a part begins that is cut from the middle of the whole, or, below 0, that the whole is the middle of. */
function middle(whole, part) {
  return part > whole ? -Math.floor((part - whole) / 2) : roundHalfEven((whole - part) / 2);
}

function roundHalfEven(value) {
  const floor = Math.floor(value);
  return value - floor === 0.5 ? floor + (floor % 2) : Math.round(value);
}

/** Resize RGBA pixels as Pillow does: first along rows, then along columns, each rounded to bytes. */
export function resize({ data, width, height }, newWidth, newHeight, filter) {
  let picture = { data, width, height, bands: 4 };
  if (newWidth !== width) {
    const rows = { data: new Uint8ClampedArray(newWidth * height * 3), width: newWidth, height, bands: 3 };
    const { bands } = picture;
    for (const [x, [first, weights]] of kernels(width, newWidth, filter).entries()) {
      for (let y = 0; y < height; y++) {
        blend(data, (y * width + first) * bands, bands, weights, rows.data, (y * newWidth + x) * 3);
      }
    }
    picture = rows;
  }
  if (newHeight !== height) {
    const { data: from, bands } = picture;
    const all = new Uint8ClampedArray(newWidth * newHeight * 3);
    for (const [y, [first, weights]] of kernels(height, newHeight, filter).entries()) {
      for (let x = 0; x < newWidth; x++) {
        blend(from, (first * newWidth + x) * bands, newWidth * bands, weights, all, (y * newWidth + x) * 3);
      }
    }
    picture = { data: all, width: newWidth, height: newHeight, bands: 3 };
  }
  return picture;
}

/** Write the weighted sum of pixels that are `stride` apart; whole numbers, as Pillow's. */
function blend(from, start, stride, weights, to, place) {
  const half = 1 << (BITS - 1);
  let [red, green, blue] = [half, half, half];
  for (let i = 0, at = start; i < weights.length; i++, at += stride) {
    red += from[at] * weights[i];
    green += from[at + 1] * weights[i];
    blue += from[at + 2] * weights[i];
  }
  to[place] = red >> BITS; // a clamped array keeps 0 to 255
  to[place + 1] = green >> BITS;
  to[place + 2] = blue >> BITS;
}

/** Return per new pixel [first old pixel, Int32Array of weights]; source: Pillow's precompute_coeffs. */
function kernels(size, newSize, { reach, weigh }) {
  const scale = size / newSize;
  const stretch = Math.max(scale, 1);
  return Array.from({ length: newSize }, (_, place) => {
    const center = (place + 0.5) * scale;
    const first = Math.max(Math.trunc(center - reach * stretch + 0.5), 0);
    const last = Math.min(Math.trunc(center + reach * stretch + 0.5), size);
    const weights = Array.from({ length: last - first }, (_, i) => weigh((i + first - center + 0.5) * (1 / stretch)));
    const sum = weights.reduce((total, weight) => total + weight, 0);
    const whole = weights.map((weight) => (weight / (sum || 1)) * 2 ** BITS);
    return [first, Int32Array.from(whole, (weight) => Math.trunc(weight + (weight < 0 ? -0.5 : 0.5)))];
  });
}
