"""torchrun without its tracebacks: what went wrong stands in the output of the processes.

python tools/torchrun.py [arguments of torchrun]
"""

import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == '__main__':
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f'with exit code {code}' if code > 0 else f'by {failure.signal_name()}'
        sys.exit(f'Process {rank} was the first to end, {how}; its own message stands above.')
    except SignalException as error:
        sys.exit(128 + error.sigval)
