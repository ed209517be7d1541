"""Concurrent calls answered in batches."""

import threading
from concurrent.futures import Future


class Batcher:
    """Joins what several threads ask for at the same time into batches, without a thread of its own.

    Whoever comes first does the work of all that wait; the others find their answers done.
    """

    def __init__(self, work, size):
        """Wrap a function of many requests.

        Args:
            work: function of a list of requests to a list of answers; an answer that is an exception is raised to
                the one who asked.
            size: requests in a batch at most.
        """
        self.work, self.size = work, size
        self.waiting, self.list_lock = [], threading.Lock()
        self.busy = threading.Lock()  # held while work is done; others may hold it to keep batches off

    def __call__(self, request):
        """Return the answer to one request.

        Raises: the exception that is its answer, or what `work` raised for the whole batch.
        """
        answer = Future()
        with self.list_lock:
            self.waiting.append((request, answer))
        with self.busy:
            while not answer.done():
                self._work_off()
        return answer.result()

    def _work_off(self):
        """Answer the requests that have waited longest."""
        with self.list_lock:
            batch, self.waiting = self.waiting[: self.size], self.waiting[self.size :]
        try:
            answers = self.work([request for request, _ in batch])
        except BaseException as error:
            answers = [error] * len(batch)
        for (_, waiter), answer in zip(batch, answers, strict=True):
            if isinstance(answer, BaseException):
                waiter.set_exception(answer)
            else:
                waiter.set_result(answer)
