"""A data sparsifier for tests."""

from parasparse import BaseDataSparsifier


class FirstRow(BaseDataSparsifier):
    """What torch's own tests use: drops the first row, counts its steps."""

    def __init__(self, *args, **kwargs):
        self.before = "kept"
        super().__init__(*args, **kwargs)

    def update_mask(self, name, data, **kwargs):
        self.get_mask(name)[0] = 0
        state = self.state[name]
        state["step_count"] = state.get("step_count", 0) + 1
        state["seen"] = kwargs
