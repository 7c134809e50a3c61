"""One colour for each phase of training, the same in every picture."""

PHASE_COLOURS = {
    "data": "#c9a227",
    "forward": "#2563a8",
    "head": "#d9541e",
    "backward": "#6ea0d6",
    "communication": "#b8304f",
    "optimizer": "#4d9a5b",
    "evaluation": "#7d5ba6",
    "checkpoint": "#2f8f9d",
    "other": "#9aa3ad",
}
