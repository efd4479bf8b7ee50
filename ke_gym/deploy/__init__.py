"""Running a proven artifact in the user's own process."""

from ke_gym.deploy.kernel import Kernel

__all__ = ["Kernel"]
