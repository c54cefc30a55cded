"""The four stages by name, and the baseline of the second."""

from __future__ import annotations

from g3n.tasks.autoencoder import AutoencoderTask
from g3n.tasks.decoder import DecoderTask
from g3n.tasks.dit import DiTTask
from g3n.tasks.forecast import ForecastTask
from g3n.tasks.mae import MAETask

TASKS = {task.name: task for task in (MAETask, DecoderTask, DiTTask, ForecastTask, AutoencoderTask)}
