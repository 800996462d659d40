"""A method with a state that no checkpoint has, so a run of it that is resumed is another one."""

from dataclasses import replace

from fastdeit.methods.supervised import Supervised


class Forgets(Supervised):
    def forward(self, batch):
        self.calls = getattr(self, "calls", 0) + self.training
        out = super().forward(batch)
        return replace(out, loss=out.loss * (1 + 0.01 * self.calls)) if self.training else out
