"""Concurrent calls answered in batches, by one thread."""

import threading
from concurrent.futures import Future


class Batcher:
    """Joins what several threads ask for at the same time into batches.

    One thread does all the work, so that what torch and the memory allocator keep for each thread that has computed,
    such as matmul buffers, is kept only once.
    """

    def __init__(self, work, size):
        """Wrap a function of many requests.

        Args:
            work: function of a list of requests to a list of answers; an answer that is an exception is raised in
                the thread that asked.
            size: requests in a batch at most.
        """
        self.work, self.size = work, size
        self.waiting, self.changed = [], threading.Condition()  # (request or function, answer, whether it is alone)
        threading.Thread(target=self._serve, name="batches", daemon=True).start()

    def __call__(self, request):
        """Return the answer to one request.

        Raises: the exception that is its answer, or what `work` raised for the whole batch.
        """
        return self._ask(request, alone=False)

    def alone(self, function):
        """Call a function without arguments between batches; returns what it returns, raises what it raises."""
        return self._ask(function, alone=True)

    def _ask(self, asked, alone):
        answer = Future()
        with self.changed:
            self.waiting.append((asked, answer, alone))
            self.changed.notify()
        return answer.result()

    def _serve(self):
        """Answer for ever."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting)
                batch = self._take()
            self._answer(batch)

    def _take(self):
        """Take what has waited longest: a function that is called alone, or a batch of requests."""
        count = next((n for n, (_, _, alone) in enumerate(self.waiting) if alone), len(self.waiting))
        count = min(count, self.size) or 1
        batch, self.waiting = self.waiting[:count], self.waiting[count:]
        return batch

    def _answer(self, batch):
        try:
            asked = [asked for asked, _, _ in batch]
            answers = [asked[0]()] if batch[0][2] else self.work(asked)
            answered = list(zip(batch, answers, strict=True))
        except BaseException as error:  # whatever it is, the thread must live, for all others wait for it
            answered = [(request, error) for request in batch]
        for (_, waiter, _), answer in answered:
            if isinstance(answer, BaseException):
                waiter.set_exception(answer)
            else:
                waiter.set_result(answer)
