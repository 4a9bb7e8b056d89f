//! Slices of rows, and the block files that are made of them.

use super::*;

#[test]
fn a_slice_beyond_the_file_says_how_many_rows_there_are() {
    let mut setup = Setup::new(&format!("{CHAT}\n{CHAT}\n{CHAT}"));
    for (split, asked) in [("train[3:5]", "train[3:5]"), ("train[7:]", "train[7:]")] {
        setup.job.datasets[0].split = Some(split.into());
        let expected = format!(
            "data.jsonl: split {asked} asks for rows that are not there: the file has 3 rows (numbered from 0)"
        );
        assert_eq!(setup.problems(), [expected]);
    }
    let notes = |setup: &Setup| {
        let counts = setup.prepare().unwrap().counts;
        let notes = counts.notes.into_iter();
        let notes = notes.filter(|note| note.contains("split"));
        (counts.rows, notes.collect::<Vec<_>>())
    };
    setup.job.datasets[0].split = Some("train[1:5]".into());
    let (rows, told) = notes(&setup);
    assert_eq!((rows, told.len()), (2, 1));
    let said = "split train[1:5] ends beyond the file, which has 3 rows: 2 rows taken";
    assert!(told[0].ends_with(said), "{told:?}");
    for whole in ["train[1:3]", "train[2:]", "train"] {
        setup.job.datasets[0].split = Some(whole.into());
        assert!(notes(&setup).1.is_empty(), "{whole}");
    }
}

#[test]
fn the_rows_in_a_block_are_found_again() {
    let text: String = (0..70)
        .map(|n| if n % 2 == 0 { 'a' } else { 'b' })
        .collect();
    let mut setup = Setup::new(&format!(
        "{{\"text\": \"{text}\"}}\n\n{{\"text\": \"hello\"}}\n{CHAT}\n"
    ));
    for packing in [true, false] {
        setup.job.sample_packing = packing;
        let data = setup.prepare().unwrap();
        let (tokenizer, template) = setup.parts();
        let lines = |blocks: &[u64]| -> Vec<u64> {
            let template = template.as_ref();
            let found = origins(&setup.job, &tokenizer, template, &data.file, blocks).unwrap();
            let file = &setup.job.datasets[0].path;
            assert!(found.iter().all(|origin| origin.file == *file));
            found.iter().map(|origin| origin.line).collect()
        };
        let every: Vec<u64> = (0..data.counts.blocks).collect();
        assert_eq!(lines(&every), [1, 3, 4]);
        assert_eq!(lines(&[0]), [1], "the first piece fills a block");
        assert_eq!(lines(&[]), [0; 0]);
        let each: Vec<Vec<u64>> = every.iter().map(|block| lines(&[*block])).collect();
        let holds = |line: u64| each.iter().filter(|lines| lines.contains(&line)).count();
        assert_eq!([holds(1), holds(3), holds(4)], [3, 1, 1], "{each:?}");
    }
}

#[test]
fn a_block_file_is_made_once_and_again_when_damaged_or_outdated() {
    let mut setup = Setup::new(CHAT);
    let made = setup.prepare().unwrap();
    let path = made.file.path().to_owned();
    let time = |path: &Path| std::fs::metadata(path).unwrap().modified().unwrap();
    let before = time(&path);
    let again = setup.prepare().unwrap();
    assert_eq!(before, time(&path), "it is reused");
    assert_eq!(again.samples, made.samples);
    assert_eq!(again.counts, made.counts);
    std::fs::write(&path, b"MUSTERBK").unwrap();
    assert_eq!(setup.prepare().unwrap().file.digest(), made.file.digest());
    setup.job.train_on_inputs = true;
    assert_ne!(setup.prepare().unwrap().file.digest(), made.file.digest());
}

#[test]
fn a_slice_of_the_rows_can_be_taken() {
    let rows: String = (0..10)
        .map(|n| format!("{{\"text\": \"hello {n}\"}}\n"))
        .collect();
    let mut setup = Setup::new(&rows);
    for (split, count) in [
        ("train[2:5]", 3),
        ("train", 10),
        ("train[:4]", 4),
        ("train[8:]", 2),
    ] {
        setup.job.datasets[0].split = Some(split.into());
        assert_eq!(setup.prepare().unwrap().counts.rows, count, "{split}");
    }
    setup.job.datasets[0].split = Some("train[x]".into());
    assert!(setup.problems()[0].contains("which names no rows"));
}

#[test]
fn block_files_of_other_inputs_are_removed_and_nothing_else() {
    let mut setup = Setup::new(CHAT);
    let old = setup.prepare().unwrap();
    setup.job.sequence_len = 64;
    let current = setup.prepare().unwrap();
    let folder = current.file.path().parent().unwrap();
    assert_eq!(old.file.path().parent(), Some(folder));
    // What only looks like one.
    let others = [
        "blocks-0123456789abcde.bin",
        "blocks-0123456789abcdef0.bin",
        "blocks-0123456789ABCDEF.bin",
        "blocks-0123456789abcdef.bin.kept",
        "journal",
    ];
    for name in others {
        std::fs::write(folder.join(name), "the user's").unwrap();
    }
    std::fs::create_dir(folder.join("blocks-0123456789abcdef.bin")).unwrap();
    prune_blocks(&current.file);
    assert!(!old.file.path().exists());
    assert!(current.file.path().is_file());
    assert!(others.iter().all(|name| folder.join(name).is_file()));
    assert!(folder.join("blocks-0123456789abcdef.bin").is_dir());
    // Whoever has it open still reads it.
    assert_eq!(blocks(&old).len() as u64, old.file.total_blocks());
}
