"""What is to be made faster: PyTorch references, their inputs, and the built-in suite."""

from ke_gym.tasks.inputs import DISTRIBUTIONS
from ke_gym.tasks.loader import library, resolve
from ke_gym.tasks.task import Precision, Reference, Task

__all__ = ["DISTRIBUTIONS", "Precision", "Reference", "Task", "library", "resolve"]
