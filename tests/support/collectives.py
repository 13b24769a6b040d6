"""Count the collectives that a call makes."""

import torch.distributed as dist


class count_collectives:
    """Context manager that records the names of the torch.distributed collectives called inside."""

    NAMES = (
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "broadcast",
        "all_to_all",
        "all_to_all_single",
    )

    def __enter__(self):
        self.calls, self.originals = [], {name: getattr(dist, name) for name in self.NAMES}
        for name, original in self.originals.items():
            setattr(dist, name, self.wrap(name, original))
        return self.calls

    def wrap(self, name, original):
        def call(*args, **kwargs):
            self.calls.append(name)
            return original(*args, **kwargs)

        return call

    def __exit__(self, *exc):
        for name, original in self.originals.items():
            setattr(dist, name, original)
