"""torchrun that ends with one sentence in place of its traceback.

python tools/torchrun.py [arguments of torchrun]
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, error_handler
from torch.distributed.run import main

if __name__ == '__main__':
    error_handler.logger.setLevel(logging.CRITICAL)  # that nobody asked for a copy of the message
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            sys.exit(f'Process {rank} was the first to end, by {failure.signal_name()}.')
        recorded = isinstance(failure.message, dict)  # by pvt_mm.engine.run
        if recorded and failure.local_rank > 0:  # which did not print it
            says = failure.message['message'].partition(': ')[2]  # after the name of the exception
        else:
            says = 'its own message stands above.'
        sys.exit(f'Process {rank} was the first to end, with exit code {failure.exitcode}; {says}')
    except SignalException as error:
        sys.exit(128 + error.sigval)
