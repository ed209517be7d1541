"""Contrasts of a page in a browser, by WCAG 2: what a script sees of it."""

# colours are [r, g, b, share]; the page behind all is opaque
CONTRAST = """
const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true})
const colour = css => { paint.clearRect(0, 0, 1, 1); paint.fillStyle = css; paint.fillRect(0, 0, 1, 1)
  const [r, g, b, a] = paint.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255] }
const over = (top, low) => [0, 1, 2].map(i => top[i] * top[3] + low[i] * (1 - top[3])).concat(1)
const fill = element => colour(getComputedStyle(element).backgroundColor)
const behind = element => element ? over(fill(element), behind(element.parentElement)) : [255, 255, 255, 1]
const light = c => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) =>
  sum + weight * (c[i] / 255 <= 0.04045 ? c[i] / 3294.6 : ((c[i] / 255 + 0.055) / 1.055) ** 2.4), 0)
const contrast = (a, b) => { const [low, high] = [light(a), light(b)].sort((x, y) => x - y)
  return (high + 0.05) / (low + 0.05) }
"""
# -> number of texts that are seen, [[text, contrast]] of those below 4.5
FAINT_TEXTS = f"""() => {{ {CONTRAST}
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = []
  let read = 0
  while (walker.nextNode()) {{
    const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim()
    if (!text || !element.checkVisibility({{visibilityProperty: true, opacityProperty: true}})) continue
    const ground = behind(element), ratio = contrast(over(colour(getComputedStyle(element).color), ground), ground)
    read += 1
    if (ratio < 4.5) found.push([text, ratio])
  }}
  return [read, found] }}"""
