"""The report of a run for export: data, a table, picture files."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from PIL import Image

from .pictures import pictures
from .statistics import RunReport, figures, status_line


class Report(RunReport):
    """What remains of a run, as ``h.report()`` gives it."""

    @classmethod
    def of(cls, report: RunReport) -> Report:
        return cls(**{field.name: getattr(report, field.name) for field in fields(report)})

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data, for JSON."""
        return figures(self)

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row for each call of attention; ImportError without pandas."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("LiteAttention: pip install pandas, or use to_dict()") from error
        return pandas.DataFrame([call._asdict() for call in self.calls])

    def save_pictures(self, folder: str | Path, theme: str = "dark") -> list[Path]:
        """Write the tile maps and the charts of steps and layers as PNG files; their paths."""
        made = pictures(self, theme, "no call of attention was computed by LiteAttention")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for kind, images in made._asdict().items():
            for index, image in enumerate(images):
                path = folder / f"{kind}-{index + 1}.png"
                Image.fromarray((image * 255).round().byte().cpu().numpy()).save(path)
                paths.append(path)
        return paths

    def __str__(self) -> str:
        return status_line(self)
