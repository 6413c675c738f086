"""What people look at: drawings, galleries, charts and pages."""
