"""What training did to an embedding space and to the negatives, in numbers, figures and a page.

Everything here works on vectors and data frames; an encoder is anything that makes vectors of texts.
"""

from pt_dance.analysis.embedding_space import compare, space
from pt_dance.analysis.figures import (
    plot_distances,
    plot_history,
    plot_hubness,
    plot_ratios,
    plot_spectra,
    plot_time,
    plot_tsne,
    to_svg,
)
from pt_dance.analysis.measures import uniform_sphere
from pt_dance.analysis.mined import MiningReport, mining
from pt_dance.analysis.report import write_report
from pt_dance.analysis.space_report import SpaceReport, describe_sample

__all__ = [
    "MiningReport",
    "SpaceReport",
    "compare",
    "describe_sample",
    "mining",
    "plot_distances",
    "plot_history",
    "plot_hubness",
    "plot_ratios",
    "plot_spectra",
    "plot_time",
    "plot_tsne",
    "space",
    "to_svg",
    "uniform_sphere",
    "write_report",
]
