"""What trains the configurations of a sweep: packed in this process, or each a trial of Ray Tune."""
