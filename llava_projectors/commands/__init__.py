"""What a user runs beside training and serving: `llava-projectors COMMAND`. Nothing else imports this."""
