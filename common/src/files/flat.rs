//! Flat buffers of scalars that are shared as long as nobody changes them. A trainer hands its state out without a copy;
//! if it comes to the next update while somebody still reads, it copies then, and changes the copy.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// Scalars in the order of a [`Layout`](super::Layout). Cloning shares them.
#[derive(Clone, Debug, PartialEq)]
pub struct Flat<T = f32>(Arc<Vec<T>>);

impl<T> From<Vec<T>> for Flat<T> {
    fn from(scalars: Vec<T>) -> Self {
        Self(Arc::new(scalars))
    }
}

impl<T> FromIterator<T> for Flat<T> {
    fn from_iter<Scalars: IntoIterator<Item = T>>(scalars: Scalars) -> Self {
        Vec::from_iter(scalars).into()
    }
}

impl<T> Deref for Flat<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

/// Access for changes: copies the scalars first where they are shared.
impl<T: Clone> DerefMut for Flat<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let own: &mut Vec<T> = Arc::make_mut(&mut self.0);
        own
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_changes_a_shared_buffer_changes_its_own() {
        let mut own: Flat = [1.0, 2.0].into_iter().collect();
        let shared = own.clone();
        assert_eq!(shared.as_ptr(), own.as_ptr(), "sharing copies nothing");
        own[1] = 3.0;
        assert_eq!((&shared[..], &own[..]), (&[1.0, 2.0][..], &[1.0, 3.0][..]));
        drop(shared);
        let before = own.as_ptr();
        own[0] = 4.0;
        assert_eq!(own.as_ptr(), before, "nobody else reads it any more");
    }
}
