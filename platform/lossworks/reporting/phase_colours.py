"""One colour for each phase of training, the same in every picture."""

from lossworks.reporting.picture_style import BLUE, GREY, ORANGE

PHASE_COLOURS = {
    "data": "#c9a227",
    "forward": BLUE,
    "head": ORANGE,
    "backward": "#6ea0d6",
    "communication": "#b8304f",
    "optimizer": "#4d9a5b",
    "evaluation": "#7d5ba6",
    "checkpoint": "#2f8f9d",
    "other": GREY,
}
