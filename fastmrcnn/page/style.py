"""Colours, widths and the order of things on a narrow screen."""

from __future__ import annotations

from typing import Any

CSS = """
.gradio-container { width: 100%; max-width: 1500px !important; margin: 0 auto; }
#heading .html-container, #message .html-container, #save .html-container, #saved .html-container,
#by-class .html-container, #by-object .html-container { padding: 0; }
#heading h1 { font-size: 1.5rem; font-weight: 650; margin: 0 0 0.25rem; }
#heading p { margin: 0; color: var(--body-text-color-subdued); }
.note, .problem { padding: 0.6rem 0.8rem; border-radius: 8px; line-height: 1.4;
    border: 1px solid var(--border-color-primary); background: var(--block-background-fill); }
.problem { border-color: var(--error-border-color); color: var(--error-text-color);
    background: var(--error-background-fill); }
.note + .problem { margin-top: 0.5rem; }
#by-class .scroll, #by-object .scroll { overflow: auto; max-height: 420px; border-radius: 8px;
    border: 1px solid var(--border-color-primary); background: var(--block-background-fill); }
#by-class table, #by-object table { width: 100%; margin: 0; border: 0 !important;
    border-collapse: collapse;
    font-variant-numeric: tabular-nums; font-size: 0.9rem; }
#by-class tr, #by-object tr { border: 0 !important; }
#by-class th, #by-object th { position: sticky; top: 0; text-align: left; font-weight: 600;
    background: var(--background-fill-secondary); }
#by-class th, #by-class td, #by-object th, #by-object td { padding: 0.35rem 0.7rem; border: 0;
    border-bottom: 1px solid var(--border-color-primary); white-space: nowrap; }
#by-class tbody tr:last-child td, #by-object tbody tr:last-child td { border-bottom: 0; }
#by-class tr.total td { font-weight: 600; }
.swatch { display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.5em; border-radius: 3px;
    vertical-align: -0.05em; }
#examples > .gallery { display: grid; grid-template-columns: repeat(4, 1fr); gap: 0.5rem; }
#examples > .gallery button { width: 100%; height: auto; aspect-ratio: 1; }
#examples > .gallery button :is(div, img) { width: 100%; height: 100%; max-height: none; object-fit: cover; }
#save { color: var(--body-text-color-subdued); font-size: 0.9rem; }
#downloads { margin-top: -0.6rem; }
@media (max-width: 760px) {
    .gradio-container .main.app { padding: 0.75rem; }
    .gradio-container .main.app > .wrap, .gradio-container main.contain, #columns > *, #left > *, #right > * {
        min-width: 0; max-width: 100%; }
    #columns, #left, #right { display: flex; flex-direction: column; flex-wrap: nowrap; }
    #left, #right { display: contents; }
    #upload { order: 1; } #examples { order: 2; } #message { order: 3; } #picture { order: 4; }
    #controls { order: 5; } #by-class { order: 6; } #by-object { order: 7; } #save { order: 8; }
    #downloads { order: 9; } #saved { order: 10; }
    #by-class th, #by-object th { white-space: normal; vertical-align: bottom; }
    #by-class th, #by-class td, #by-object th, #by-object td { padding: 0.3rem 0.45rem; font-size: 0.82rem; }
}
"""


def theme(gr: Any) -> Any:
    """Plain, with the fonts of the system: gradio's own themes may ask others for theirs."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    return gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"]
    )
