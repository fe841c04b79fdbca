"""Every accuracy that README.md and the recipes quote of a paper, against a table that says where it is from."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PAPER = """
    Table 2, joint CE: 42.5 64.9 35.2 6.8   tau-norm: 46.7 56.6 44.2 27.4   the text, KCL above cRT: 4.2
    Table 3: 61.1 64.6 68.0 65.2 65.6 66.3
    Table 4, the text: 10.5 1.8 58.3 32.5 13.4 58.2 4.3
    Table 1, the text, CL above CE on Places: 2.74
    Table 11, VOC, CL from ImageNet-LT: 78.19 51.52 56.48   KCL: 79.70 52.63 57.89   CL from ImageNet: 56.10 62.71
        KCL: 82.32 55.51 62.05
    Table 12, COCO from ImageNet-LT, CL: 39.67 59.40 42.73 34.73 56.07 37.13   KCL: 39.43 59.08 42.56 34.38 55.81 36.39
        from ImageNet, CL: 60.05 44.09 56.88 37.56 35.14   KCL: 40.79 60.63 43.99 35.45 57.40 37.80
"""
DIFFERENCES = """
    computed from differences that the paper prints: 51.5 68.6 76.5 76.45 76.55 48.53 51.01 81.26 53.66 59.19 81.28
    38.13 57.38 41.15 33.29 54.24 35.38 40.01 59.76 43.29 34.85 56.60 37.02 40.34
"""
OTHERS = """
    Kang et al. 2020: 47.3   TSC's authors, KCL on ImageNet-LT with other settings: 51.2 51.6
    TSC's authors, CIFAR-10-LT and CIFAR-100-LT, CE: 70.4 74.8 86.4 38.3 43.9 55.7   KCL: 77.6 81.7 88.0 42.8 46.3 57.6
        LDAM-DRW at imbalance 100: 77.0 42.0
"""


def numbers(text):
    return re.findall(r"(?<![\w./-])\d{1,2}\.\d{1,2}(?![\w./%]|\.\d)", text)


def quoted(file):
    """A recipe's comment at the top, without its lines on data and hours. From README.md the table of the paper."""
    text = file.read_text()
    if file.name == "README.md":
        rows = text[text.index("| paper | it reports"):text.index("By hand on 8 GPUs")].splitlines()
        return "\n".join(" ".join(row.split("|")[1:3]) if row.startswith("|") else row for row in rows)
    comment = text.partition("set -")[0]
    return comment[:comment.index("# Data:")] if "# Data:" in comment else ""


FILES = [ROOT / "README.md", *sorted(ROOT.glob("recipes/*.sh"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_quoted_number_has_its_source(file):
    known = {*numbers(PAPER), *numbers(DIFFERENCES), *numbers(OTHERS), "0.99"}  # m of CIFAR, a setting of ours
    assert set(numbers(quoted(file))) <= known


def test_the_differences_are_computed_right():
    assert round(47.3 + 4.2, 1) == 51.5                                   # cRT of Kang et al. 2020 + the paper's text
    assert round(65.6 + 3, 1) == 68.6                                     # tau-norm + "3 %", a rounded number
    assert "51.5" in numbers(quoted(ROOT / "README.md")) and "42.5" in numbers(quoted(ROOT / "README.md"))
    # classes of exactly 20 images are few in the paper's SL row: with 385 / 479 / 136 classes the groups give more
    assert round((385 * 64.9 + 479 * 35.2 + 136 * 6.8) / 1000, 2) == 42.77
