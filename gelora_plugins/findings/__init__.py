"""What the runs of a comparison come to: their record, results, contrasts, statistics, pictures. Needs no torch."""
