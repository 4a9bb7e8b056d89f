//! Preflight: job, model and data become what training needs, or errors.
