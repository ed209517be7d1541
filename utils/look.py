"""The look that all pages share: colours, light and dark, and letters. docs/browser/style.css begins with the same.

Text on `page` and on `card`, and `on-accent` on `accent`, have a contrast of at least 4.5; `line` and `accent`, which
bound controls and mark the one in focus, at least 3.
"""

LIGHT = {
    "page": "#faf8f5", "card": "#ffffff", "text": "#221d18", "quiet": "#5d544b", "line": "#8b8177",
    "accent": "#9a3a0a", "on-accent": "#ffffff", "error": "#a11212",
}  # fmt: skip
DARK = {
    "page": "#181513", "card": "#24201d", "text": "#f1ece6", "quiet": "#b9afa5", "line": "#8d8378",
    "accent": "#f6a56f", "on-accent": "#2a1405", "error": "#ff9c93",
}  # fmt: skip


def _root(colours, indent=""):
    """Return the style rule that names colours."""
    lines = "".join(f"{indent}  --{name}: {value};\n" for name, value in colours.items())
    return f"{indent}:root {{\n{lines}{indent}}}\n"


COLOURS = f"{_root(LIGHT)}\n@media (prefers-color-scheme: dark) {{\n{_root(DARK, '  ')}}}\n"
PAGE = (
    COLOURS
    + """
:root { color-scheme: light dark; --good: #1a6b42; --thin: #e2dcd5; --marked: #fbe3dc; }
@media (prefers-color-scheme: dark) { :root { --good: #7fd3a6; --thin: #3a342f; --marked: #4f2620; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 75rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1, h2 { line-height: 1.2; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .5rem; }
p { margin: .25rem 0; max-width: 46rem; }
.quiet { color: var(--quiet); font-size: .9rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; border-bottom: 1px solid var(--thin); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { font-weight: 600; color: var(--quiet); }
mark { background: var(--marked); color: var(--error); border-radius: .2em; padding: 0 .15em; }
.card { background: var(--card); border: 1px solid var(--thin); border-radius: .75rem; overflow: hidden; }
a:focus-visible, summary:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
@media (max-width: 800px) {  /* a row of many columns is a list of what they are called and hold */
  td { white-space: normal; } .wide thead { display: none; } .wide, .wide tbody { display: block; }
  .wide tr { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); padding: .4rem 0;
    border-bottom: 1px solid var(--line); }
  .wide td { border: 0; padding: .15rem .75rem .15rem 0; text-align: left; }
  .wide td:first-child { grid-column: 1 / -1; font-weight: 650; }
  .wide td[data-of]::before { content: attr(data-of) ": "; color: var(--quiet); font-weight: 400; }
}
"""
)
