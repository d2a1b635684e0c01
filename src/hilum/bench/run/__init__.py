"""Tasks × encoders × heads → predictions and scores."""
