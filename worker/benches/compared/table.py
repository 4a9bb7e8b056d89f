"""How rows are printed: name, both figures, their ratio, the goal, and whether it was reached."""

from dataclasses import dataclass

TITLE = "| work | | Muster | peer | ratio | goal | reached | others |"
RULE = "|---|---|---|---|---|---|---|---|"


@dataclass
class Line:
    """One ratio. `at_most` marks those that are better when small."""

    work: str
    unit: str
    ours: float
    theirs: float
    goal: float
    others: float
    at_most: bool = False
    # Seconds compare as speeds: theirs by ours.
    inverse: bool = False
    remark: str = ""

    @property
    def ratio(self):
        return self.theirs / self.ours if self.inverse else self.ours / self.theirs

    @property
    def reached(self):
        return self.ratio <= self.goal if self.at_most else self.ratio >= self.goal

    def __str__(self):
        bound = "at most" if self.at_most else "at least"
        reached = "yes" if self.reached else "**no**"
        work = f"{self.work} ({self.remark})" if self.remark else self.work
        return (
            f"| {work} | {self.unit} | {figure(self.ours)} | {figure(self.theirs)} | **{self.ratio:.2f}x** "
            f"| {bound} {self.goal:.2f}x | {reached} | {self.others:.0%} |"
        )


def figure(value):
    """Three digits or more."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
