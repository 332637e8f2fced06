"""Processes that work side by side, each on one CPU thread: small tensors, for which a second thread costs more than it gives."""

import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait

import torch


def one_thread_pool(num_processes: int) -> ProcessPoolExecutor:
    """Returns a pool of so many processes, which end when this one does, however it ends."""
    return ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"), initializer=start_worker)


def start_worker() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Waits for the end of the process that started this one, and ends with it: else it would finish its task beside the next attempt."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
