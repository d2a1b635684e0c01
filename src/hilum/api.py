"""Every command as a Python function of the same name: `from hilum import api`, then `api.prepare(...)`."""

from hilum.archive.doctor.inspect import inspect
from hilum.archive.doctor.overview import show
from hilum.archive.phantom import write_phantom as phantom
from hilum.archive.prepare import prepare
from hilum.archive.scan import scan
from hilum.demo import demo
from hilum.encode.embed import embed
from hilum.pretrain.loop import pretrain
from hilum.pretrain.plan import plan
from hilum.probe.fit import probe

__all__ = ["demo", "embed", "inspect", "phantom", "plan", "prepare", "pretrain", "probe", "scan", "show"]
