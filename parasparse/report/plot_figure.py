"""The Figure that `plot` returns; imports matplotlib."""

import io

from matplotlib.figure import Figure


class Picture(Figure):
    """A Figure that notebooks show even if pyplot has not been imported."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
