"""Where figures go besides the run folder's tables: TensorBoard if it is installed, Weights & Biases if asked for.

In: the figures of each row of `metrics.csv` and `validation.csv`. Out: RUN/tensorboard; RUN/wandb and, unless
WANDB_MODE=offline, the project on the server. What a process that was killed had sent beyond the checkpoint is sent
again after a resume: TensorBoard drops the older values, Weights & Biases the newer ones, which are equal.
"""

import importlib.util
import uuid
import warnings
from collections.abc import Mapping
from typing import Any

from protformer.config import RunConfig
from protformer.errors import ConfigError, InputError
from protformer.training.metrics_log import MetricsSink
from protformer.training.run_folder import RunFolder
from protformer.whole_file import write_whole


def check_metric_sinks(config: RunConfig) -> None:
    """Raise ConfigError where a package is missing that the configuration asks for."""
    if config.training.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError("training.wandb_project: needs the package wandb: pip install 'protformer[wandb]'")


def open_metric_sinks(config: RunConfig, run: RunFolder, resolved: Mapping[str, object]) -> list[MetricsSink]:
    """`resolved` is the configuration as plain values, for the server."""
    sinks: list[MetricsSink] = []
    if importlib.util.find_spec("tensorboard") is not None:
        sinks.append(TensorBoard(run))
    if config.training.wandb_project is not None:
        sinks.append(WeightsAndBiases(run, config.training.wandb_project, resolved))
    return sinks


class TensorBoard:
    """Scalars by torch's SummaryWriter."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self._writer: Any = None

    def start(self, step: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of what TensorBoard imports
            from torch.utils.tensorboard import SummaryWriter
        self._writer = SummaryWriter(str(self.run.tensorboard), purge_step=step + 1 if step else None)

    def write(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """One W&B run for a run folder, whatever interrupts it: its id is kept in RUN/wandb_id."""

    def __init__(self, run: RunFolder, project: str, resolved: Mapping[str, object]) -> None:
        self.run, self.project, self.resolved = run, project, dict(resolved)
        self._wandb_run: Any = None

    def start(self, step: int) -> None:
        import wandb

        file = self.run.root / "wandb_id"
        if not file.exists():
            write_whole(file, lambda partial: partial.write_text(uuid.uuid4().hex[:8], encoding="ascii"))
        try:
            self._wandb_run = wandb.init(
                project=self.project,
                name=self.run.root.resolve().name,
                id=file.read_text(encoding="ascii"),
                resume="allow",
                dir=str(self.run.root),
                config=self.resolved,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            raise InputError(
                f"training.wandb_project: {error}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._wandb_run.log(figures, step=step)

    def close(self) -> None:
        if self._wandb_run is not None:
            self._wandb_run.finish()
