"""Values that all threads share are changed by one thread at a time, in whatever order they are asked for."""

from __future__ import annotations

import threading
import time
import warnings

from PIL import Image

from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.slides.raster import any_size


def test_threads_that_need_both_in_another_order_do_not_wait_for_each_other() -> None:
    inside = threading.Event()

    def one() -> None:
        with quiet_warnings():
            inside.set()
            time.sleep(0.1)
            with any_size():
                pass

    def other() -> None:
        inside.wait()
        with any_size(), quiet_warnings():
            pass

    threads = [threading.Thread(target=each, daemon=True) for each in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)


def test_what_was_changed_is_as_it_was_afterwards() -> None:
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    with any_size(), quiet_warnings():
        assert Image.MAX_IMAGE_PIXELS is None
        warnings.warn("unheard", stacklevel=1)
    assert limit == Image.MAX_IMAGE_PIXELS
    assert list(warnings.filters) == filters
