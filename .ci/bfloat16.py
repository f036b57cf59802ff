"""nbdev_test, with the same options, as on a GPU or a CPU that computes in bfloat16, whatever this machine does.

A parameter cannot do it, because lessons set their own. nbdev_test's workers are forks, so they see the patch."""
from nbdev.test import nbdev_test

from looper_math import models

models.computes_bfloat16 = lambda: True
nbdev_test()
