"""One device interface and its three implementations: accelerator, one memory, fake."""

from .accelerator import AcceleratorDevice
from .fake import FakeDevice
from .interface import Device, Event, HostEvent
from .one_memory import OneMemoryDevice

__all__ = ["AcceleratorDevice", "Device", "Event", "FakeDevice", "HostEvent", "OneMemoryDevice"]
