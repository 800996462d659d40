"""`fastdeit chaos`: a training that is interrupted again and again, and held against one that was not.

    faults   what is done to the run, and when: a function of the seed
    victim   in the processes of the run: it does the fault, and writes down what the run sees
    lives    starts the run, waits for its end, and starts it again
    damage   spoils a checkpoint
    compare  the two runs, bit for bit
    judge    how a life should have ended, and what was lost over all
    report   what is printed at the end
    command  the verb

Nothing of this is in the path of a training: `victim` wraps the loop from outside, in processes that chaos has started.
"""
