"""What the authors' notebooks printed, recomputed by this engine and compared digit by digit."""
