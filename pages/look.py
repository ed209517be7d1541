"""Gradio's theme in the colours that all pages share."""

import gradio as gr

from utils.look import DARK, LIGHT

FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # none is downloaded

# colour of utils/look.py: what gradio paints with it
PAINTED = {
    "page": "body_background_fill background_fill_secondary color_accent_soft code_background_fill "
    "checkbox_label_background_fill_hover button_secondary_background_fill_hover",
    "card": "background_fill_primary block_background_fill block_label_background_fill input_background_fill "
    "input_background_fill_focus checkbox_background_color checkbox_label_background_fill "
    "checkbox_label_background_fill_selected button_secondary_background_fill error_background_fill",
    "text": "body_text_color block_title_text_color block_label_text_color checkbox_label_text_color "
    "checkbox_label_text_color_selected button_secondary_text_color button_secondary_text_color_hover",
    "quiet": "body_text_color_subdued block_info_text_color input_placeholder_color",
    "line": "border_color_primary input_border_color checkbox_border_color checkbox_label_border_color "
    "button_secondary_border_color",
    "accent": "border_color_accent link_text_color link_text_color_hover link_text_color_active slider_color "
    "link_text_color_visited loader_color input_border_color_focus checkbox_border_color_selected "
    "checkbox_label_border_color_selected button_primary_background_fill button_primary_background_fill_hover "
    "button_primary_border_color",
    "on-accent": "button_primary_text_color button_primary_text_color_hover",
    "error": "error_text_color error_icon_color error_border_color",
}


def theme():
    """Return gradio's soft theme in the shared colours, with quiet labels and system fonts."""
    painted = {"color_accent": LIGHT["accent"]}  # no dark twin: fragments.py's STYLE uses the slider's
    for colour, names in PAINTED.items():
        for name in names.split():
            painted |= {name: LIGHT[colour], f"{name}_dark": DARK[colour]}
    plain = {"background_fill": "transparent", "background_fill_dark": "transparent", "padding": "0"}
    return gr.themes.Soft(primary_hue="orange", neutral_hue="stone", font=FONT, font_mono=("monospace",)).set(
        **painted, **{f"block_title_{name}": value for name, value in plain.items()}, input_border_width="1px",
        checkbox_label_border_width="1px", input_shadow="none", checkbox_label_shadow="none",
        button_transition="background-color .2s",  # outlines appear at once
    )  # fmt: skip
