use proptest::prelude::*;
use tar::Header;

use super::super::error::Class;
use super::super::testing::{ARTIFACT, IMAGE, Memory, Tar, gzip, refusal, unpack_all, zstd};
use super::super::volume_path::PathError;
use super::*;

fn lines(bytes: &[u8]) -> Vec<String> {
    let (result, memory) = unpack_all(bytes, &IMAGE, &Limits::default());
    result.unwrap_or_else(|error| panic!("{error:?}"));
    memory.lines()
}

fn small() -> Tar {
    Tar::new().folder("bin/", 0o755).file("bin/tool", "#!tool").link(b'2', "bin/sh", "tool")
}

const SMALL: [&str; 3] = ["bin/", "bin/tool=#!tool", "bin/sh->tool"];

#[test]
fn all_types_of_entries_are_read() {
    let tar = Tar::new()
        .folder("./", 0o700)
        .file("a", "A")
        .link(b'1', "b", "./a")
        .file("dir/.wh.gone", "")
        .file("dir/.wh..wh..opq", "")
        .file(".wh..wh..opq", "");
    assert_eq!(lines(&tar.end()), ["./", "a=A", "b=>a", "-dir/gone", "-dir/*", "-./*"]);
}

#[test]
fn the_permissions_rule_applies_to_metadata() {
    let tar = Tar::new().file_with_mode("f", "", 0o4600).end();
    let unpacked = |rule| {
        let mut memory = Memory::default();
        unpack(&*tar, &IMAGE, rule, &Limits::default(), &mut memory).unwrap();
        memory.entries[0].metadata.clone()
    };
    let readable = unpacked(PermissionsRule::Readable);
    assert_eq!(readable.permissions, Permissions { mode: 0o644, uid: 0, gid: 0 });
    assert_eq!((readable.modified.seconds, readable.modified.nanoseconds), (1000, 0));
    let preserved = unpacked(PermissionsRule::Preserve);
    assert_eq!(preserved.permissions, Permissions { mode: 0o600, uid: 7, gid: 8 });
}

#[test]
fn totals_of_the_whole_archive_and_its_digest_where_one_is_named() {
    let tar = small().end();
    let (result, _) = unpack_all(&gzip(&tar), &ARTIFACT, &Limits::default());
    let totals = result.unwrap();
    assert_eq!((totals.entries, totals.files, totals.bytes), (3, 1, 6));
    assert_eq!((totals.tar_bytes, totals.tar_digest), (tar.len() as u64, None));
    let rule = ArchiveRule { tar_digest: Some(Digest::of(&tar)), ..ARTIFACT };
    let (result, _) = unpack_all(&gzip(&tar), &rule, &Limits::default());
    assert_eq!(result.unwrap().tar_digest, Some(Digest::of(&tar)));
}

#[test]
fn every_compression_is_recognised() {
    let tar = small().end();
    assert_eq!(lines(&tar), SMALL);
    assert_eq!(lines(&gzip(&tar)), SMALL);
    assert_eq!(lines(&zstd(&tar)), SMALL);
    assert_eq!(lines(b""), [""; 0]);
}

#[test]
fn several_gzip_members_and_zstd_frames_are_read() {
    let tar = small().end();
    for packed in [gzip, zstd] {
        let joined: Vec<_> = tar.chunks(700).flat_map(packed).collect();
        assert_eq!(lines(&joined), SMALL);
    }
    let mut skippable = vec![0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9];
    skippable.extend(zstd(&tar));
    assert_eq!(lines(&skippable), SMALL);
}

#[test]
fn a_reader_that_gives_one_byte_at_a_time() {
    struct OneByOne<'a>(&'a [u8]);
    impl Read for OneByOne<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let length = buffer.len().min(1);
            self.0.read(&mut buffer[..length])
        }
    }
    let packed = zstd(&small().end());
    let mut memory = Memory::default();
    let (rule, limits) = (PermissionsRule::Readable, Limits::default());
    unpack(OneByOne(&packed), &IMAGE, rule, &limits, &mut memory).unwrap();
    assert_eq!(memory.lines(), SMALL);
}

#[test]
fn zeros_after_gzip_are_padding_and_anything_else_is_not() {
    let mut packed = gzip(&small().end());
    packed.extend([0; 3000]);
    assert_eq!(lines(&packed), SMALL);
    for garbage in [&b"x"[..], b"\x1f", b"\x1f\x8b"] {
        packed.truncate(packed.len() - 3000);
        packed.extend(garbage);
        assert!(matches!(refusal(&packed), UnpackError::Decompress(_)));
        packed.truncate(packed.len() - garbage.len());
        packed.extend([0; 3000]);
    }
    packed.push(b'x');
    assert!(matches!(refusal(&packed), UnpackError::Decompress(_)));
}

#[test]
fn a_truncated_or_damaged_stream_is_corrupt() {
    let tar = Tar::new().file("f", &"content ".repeat(1000)).end();
    for packed in [gzip(&tar), zstd(&tar)] {
        for length in 5..packed.len() {
            assert_eq!(refusal(&packed[..length]).class(), Class::Corrupt, "{length}");
        }
    }
    let mut packed = gzip(&tar);
    let checksum = packed.len() - 6;
    packed[checksum] ^= 1;
    assert!(matches!(refusal(&packed), UnpackError::Decompress(_)));
}

#[test]
fn an_archive_that_ends_early_is_corrupt() {
    let tar = Tar::new().file("f", &"x".repeat(600)).end();
    for length in [1, 100, 511, 512, 600, 1111] {
        let error = refusal(&tar[..length]);
        assert!(matches!(error, UnpackError::Archive { .. }), "{length}: {error:?}");
    }
    // The content is complete: padding and the end marker may be missing.
    for length in [1112, 1300, 1536, 2048] {
        assert_eq!(lines(&tar[..length]).len(), 1, "{length}");
    }
}

#[test]
fn content_that_is_not_an_archive_is_corrupt() {
    assert!(matches!(refusal(&[b'x'; 2000]), UnpackError::Archive { .. }));
    let mut tar = small().end();
    tar[0] ^= 1;
    assert!(matches!(refusal(&tar), UnpackError::Archive { .. }));
    let mut tar = small().end();
    let end = tar.len() - 512;
    tar[end] = 1;
    assert!(matches!(refusal(&tar), UnpackError::Archive { .. }));
}

#[test]
fn the_digest_covers_what_follows_the_archive() {
    let mut tar = small().end();
    tar.extend([7; 700]);
    let rule = |digest| ArchiveRule { tar_digest: Some(digest), ..ARTIFACT };
    let limits = Limits::default();
    unpack_all(&gzip(&tar), &rule(Digest::of(&tar)), &limits).0.unwrap();
    let wrong = unpack_all(&gzip(&tar), &rule(Digest::of(b"")), &limits).0.unwrap_err();
    assert!(matches!(wrong, UnpackError::TarDigest { .. }));
    assert_eq!(wrong.class(), Class::Corrupt);
}

#[test]
fn names_that_leave_the_tree_are_refused() {
    for (name, reason) in [
        ("../x", PathError::Parent),
        ("/../x", PathError::Parent),
        ("a/../../x", PathError::Parent),
        ("a/..", PathError::Parent),
    ] {
        let error = refusal(&Tar::new().file(name, "").end());
        assert!(matches!(&error, UnpackError::Name { reason: r, .. } if *r == reason), "{error:?}");
        assert_eq!(error.class(), Class::Refused);
    }
}

#[test]
fn the_root_is_only_a_folder() {
    for name in ["", "/", ".", "./"] {
        let tar = Tar::new().file(name, "content").link(b'2', name, "x").link(b'1', name, "f");
        let tar = tar.link(b'6', name, "").file("f", "F").end();
        for rule in [&IMAGE, &ARTIFACT] {
            let (unpacked, memory) = unpack_all(&tar, rule, &Limits::default());
            let totals = unpacked.expect("unpacked");
            assert_eq!(memory.lines(), ["f=F"], "{name:?}");
            assert_eq!((totals.skipped, totals.files, totals.bytes), (4, 1, 1), "{name:?}");
        }
    }
    assert_eq!(lines(&Tar::new().folder("", 0o700).end()), ["./"]);
}

#[test]
fn names_over_a_limit_are_refused() {
    let long =
        |name: &str| refusal(&Tar::new().pax(&[("path", name.as_bytes())]).file("x", "").end());
    for (name, expected) in [
        ("n".repeat(256), PathError::NameTooLong { length: 256, limit: 255 }),
        ("d/".repeat(257), PathError::TooDeep { limit: 256 }),
        ("ddddddddddddddddddd/".repeat(210), PathError::TooLong { length: 4099, limit: 4095 }),
    ] {
        let error = long(name.trim_end_matches('/'));
        assert!(
            matches!(&error, UnpackError::Name { reason, .. } if *reason == expected),
            "{error:?}"
        );
        assert!(error.to_string().len() < 1024);
    }
    let nul = refusal(&Tar::new().pax(&[("path", b"a\0b")]).file("x", "").end());
    assert!(matches!(nul, UnpackError::Name { reason: PathError::Nul, .. }));
}

#[test]
fn hard_links_out_of_the_tree_are_refused() {
    for target in ["../x", "/../x", "", ".", "/"] {
        let error = refusal(&Tar::new().link(b'1', "l", target).end());
        assert!(matches!(error, UnpackError::HardLinkName { .. }), "{error:?}");
        assert_eq!(error.class(), Class::Refused);
    }
}

#[test]
fn invalid_targets_of_symbolic_links_are_refused() {
    let tar = Tar::new().link(b'2', "l", "/etc/passwd").link(b'2', "m", "../../x");
    assert_eq!(lines(&tar.end()), ["l->/etc/passwd", "m->../../x"]);
    let empty = refusal(&Tar::new().link(b'2', "l", "").end());
    assert!(matches!(empty, UnpackError::SymbolicLinkTarget { .. }));
    for target in [vec![b't'; 4096], b"a\0b".to_vec()] {
        let tar = Tar::new().pax(&[("linkpath", &target)]).link(b'2', "l", "x").end();
        assert!(matches!(refusal(&tar), UnpackError::SymbolicLinkTarget { .. }));
    }
}

#[test]
fn absolute_names_are_rooted() {
    let tar = Tar::new()
        .folder("/", 0o700)
        .folder("/usr/", 0o755)
        .file("//usr//bin/x", "X")
        .link(b'1', "/usr/y", "/usr/bin/x")
        .link(b'2', "/z", "/usr")
        .file("/usr/.wh.gone", "")
        .file("/.wh..wh..opq", "");
    let expected =
        ["./", "usr/", "usr/bin/x=X", "usr/y=>usr/bin/x", "z->/usr", "-usr/gone", "-./*"];
    assert_eq!(lines(&tar.end()), expected);
}

#[test]
fn devices_and_fifos_are_counted_and_not_shown() {
    for kind in *b"346" {
        let mut header = Tar::header(b"dev/special", kind, 0);
        // Their owner and size are ignored, since they are not shown.
        header.as_old_mut().uid = [0xff; 8];
        let tar = Tar::new().file("a", "A").member(header, b"").file("b", "B").end();
        for (rule, expected) in
            [(&IMAGE, vec!["a=A", "dev/special!", "b=B"]), (&ARTIFACT, vec!["a=A", "b=B"])]
        {
            let mut memory = Memory::default();
            let preserve = PermissionsRule::Preserve;
            let totals = unpack(&*tar, rule, preserve, &Limits::default(), &mut memory).unwrap();
            assert_eq!(memory.lines(), expected);
            assert_eq!((totals.skipped, totals.files), (1, 2));
        }
    }
    let unknown = refusal(&Tar::new().link(b'V', "label", "").end());
    assert!(matches!(unknown, UnpackError::EntryType { .. }));
}

#[test]
fn owners_outside_the_range_are_refused_only_with_preserve() {
    let header = |owner: [u8; 8]| {
        let mut header = Tar::header(b"f", b'0', 0);
        header.as_old_mut().uid = owner;
        header
    };
    let archives = [
        (Tar::new().member(header([0xff; 8]), b""), "-1:8"),
        (Tar::new().member(header([0x80, 0, 0, 1, 0, 0, 0, 0]), b""), "4294967296:8"),
        (Tar::new().member(header([0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]), b""), "4294967295:8"),
        (Tar::new().member(header(*b"99xx99\0\0"), b""), "?:8"),
        (Tar::new().pax(&[("uid", b"99999999999999999999")]).file("f", ""), "?:8"),
        (Tar::new().pax(&[("gid", b"-5")]).file("f", ""), "7:-5"),
        (Tar::new().pax(&[("gid", b"x")]).file("f", ""), "7:?"),
    ];
    for (tar, owner) in archives {
        let tar = tar.end();
        assert_eq!(lines(&tar), ["f="], "{owner}");
        let mut memory = Memory::default();
        let preserve = PermissionsRule::Preserve;
        let error = unpack(&*tar, &IMAGE, preserve, &Limits::default(), &mut memory).unwrap_err();
        assert!(matches!(error, UnpackError::Owner { .. }), "{error:?}");
        assert!(error.to_string().contains(&format!("the owner {owner},")), "{error}");
    }
}

/// A file whose data is `ab` at 2 and `c` at 7 of 9 bytes.
fn sparse_file(form: &str) -> Tar {
    let pax1 = |tar: Tar, map: &str, data: &str| {
        let mut content = map.as_bytes().to_vec();
        content.resize(content.len().next_multiple_of(512), 0);
        content.extend_from_slice(data.as_bytes());
        tar.member(Tar::header(b"GNUSparseFile.1/f", b'0', content.len() as u64), &content)
    };
    match form {
        "gnu" => {
            let mut header = Header::new_gnu();
            header.as_old_mut().name[0] = b'f';
            header.as_old_mut().linkflag = [b'S'];
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(1000);
            header.set_size(3);
            let gnu = header.as_gnu_mut().unwrap();
            gnu.set_real_size(9);
            for (extent, (offset, length)) in gnu.sparse.iter_mut().zip([(2, 2), (7, 1), (9, 0)]) {
                extent.set_offset(offset);
                extent.set_length(length);
            }
            Tar::new().member(header, b"abc")
        }
        "0.0" => Tar::new()
            .pax(&[
                ("GNU.sparse.size", b"9"),
                ("GNU.sparse.numblocks", b"2"),
                ("GNU.sparse.offset", b"2"),
                ("GNU.sparse.numbytes", b"2"),
                ("GNU.sparse.offset", b"7"),
                ("GNU.sparse.numbytes", b"1"),
            ])
            .file("f", "abc"),
        "0.1" => Tar::new()
            .pax(&[
                ("GNU.sparse.size", b"9"),
                ("GNU.sparse.numblocks", b"2"),
                ("GNU.sparse.map", b"2,2,7,1"),
                ("GNU.sparse.name", b"f"),
            ])
            .file("GNUSparseFile.1/f", "abc"),
        _ => {
            let records: [(&str, &[u8]); 4] = [
                ("GNU.sparse.major", b"1"),
                ("GNU.sparse.minor", b"0"),
                ("GNU.sparse.name", b"f"),
                ("GNU.sparse.realsize", b"9"),
            ];
            pax1(Tar::new().pax(&records), "3\n2\n2\n7\n1\n9\n0\n", "abc")
        }
    }
}

const SPARSE_FORMS: [&str; 4] = ["gnu", "0.0", "0.1", "1.0"];

#[test]
fn sparse_files_are_expanded_in_every_form() {
    for form in SPARSE_FORMS {
        let tar = sparse_file(form).file("after", "x").end();
        for rule in [&IMAGE, &ARTIFACT] {
            let (result, memory) = unpack_all(&tar, rule, &Limits::default());
            let totals = result.unwrap_or_else(|error| panic!("{form}: {error:?}"));
            assert_eq!(memory.lines(), ["f=\0\0ab\0\0\0c\0", "after=x"], "{form}");
            assert_eq!(totals.bytes, 10, "{form}");
        }
    }
}

#[test]
fn a_sparse_file_with_a_wrong_map_is_corrupt() {
    let pax = |map: &[u8], size: &[u8]| {
        let records = [("GNU.sparse.size", size), ("GNU.sparse.map", map)];
        Tar::new().pax(&records).file("f", "abc").end()
    };
    for (map, size) in [
        (&b"2,2,7,1"[..], &b"7"[..]),
        (b"2,2,3,1", b"9"),
        (b"7,1,2,2", b"9"),
        (b"2,2,7,2", b"9"),
        (b"2,2", b"9"),
        (b"2,2,7", b"9"),
        (b"2,x,7,1", b"9"),
        (b"-2,2,7,1", b"9"),
        (b"2,2,9223372036854775807,1", b"9"),
        (b"2,2,7,1", b"-9"),
    ] {
        let error = refusal(&pax(map, size));
        assert_eq!(error.class(), Class::Corrupt, "{}", String::from_utf8_lossy(map));
    }
    let folder = Tar::new().pax(&[("GNU.sparse.map", b"0,1")]).folder("d/", 0o755).end();
    assert_eq!(refusal(&folder).class(), Class::Corrupt);
    let unknown = Tar::new().pax(&[("GNU.sparse.major", b"2"), ("GNU.sparse.minor", b"0")]);
    assert!(matches!(refusal(&unknown.file("f", "x").end()), UnpackError::Sparse { .. }));
    let star = Tar::new().link(b'S', "f", "").end();
    assert!(matches!(refusal(&star), UnpackError::Sparse { .. }));
    for form in SPARSE_FORMS {
        let tar = sparse_file(form).bytes;
        let error = refusal(&tar[..tar.len() - 511]);
        assert_eq!(error.class(), Class::Corrupt, "{form}");
    }
}

#[test]
fn the_expansion_of_sparse_files_is_bounded() {
    let holes = |size: &str| {
        let records = [("GNU.sparse.size", size.as_bytes()), ("GNU.sparse.numblocks", b"0")];
        Tar::new().pax(&records).file("f", "").end()
    };
    let (whole, _) = unpack_all(&holes("1000000"), &IMAGE, &Limits::default());
    assert_eq!(whole.unwrap().bytes, 1_000_000);
    let bytes = Limits { unpacked_bytes: 999_999, ..Limits::default() };
    let error = unpack_all(&holes("1000000"), &IMAGE, &bytes).0.unwrap_err();
    assert!(matches!(error, UnpackError::TooManyBytes { .. }), "{error:?}");
    let ratio = Limits { decompression_ratio_floor: 1 << 20, ..Limits::default() };
    let error = unpack_all(&holes("1000000000"), &IMAGE, &ratio).0.unwrap_err();
    assert!(matches!(error, UnpackError::Ratio { limit: 200 }), "{error:?}");
    // The limit of extended headers applies to maps too.
    let records: [(&str, &[u8]); 2] = [("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0")];
    let map = format!("9999999\n{}", "1\n".repeat(1 << 20));
    let tar = Tar::new().pax(&records).file("f", &map).end();
    assert!(matches!(refusal(&tar), UnpackError::HeaderTooLarge { .. }));
}

#[test]
fn whiteouts_are_checked_and_only_meant_in_images() {
    for name in [".wh.", ".wh..", ".wh...", "a/.wh.", ".wh.x/.wh."] {
        let error = refusal(&Tar::new().file(name, "").end());
        assert!(matches!(error, UnpackError::Whiteout { .. }), "{name}: {error:?}");
    }
    // As in containerd, only the last name counts: below a folder of AUFS are files that links lead to.
    let aufs = Tar::new()
        .folder(".wh..wh.plnk/", 0o700)
        .file(".wh..wh.plnk/1.2", "x")
        .link(b'1', "real", ".wh..wh.plnk/1.2")
        .file(".wh..wh.aufs", "");
    let expected = ["-.wh.plnk", ".wh..wh.plnk/1.2=x", "real=>.wh..wh.plnk/1.2", "-.wh.aufs"];
    assert_eq!(lines(&aufs.end()), expected);
    let tar = Tar::new().file(".wh.a", "x").end();
    assert_eq!(unpack_all(&tar, &ARTIFACT, &Limits::default()).1.lines(), [".wh.a=x"]);
}

#[test]
fn pax_headers_apply_to_the_next_entry_only() {
    let long = "l".repeat(200);
    let tar = Tar::new()
        .pax(&[
            ("path", long.as_bytes()),
            ("mtime", b"-1.5"),
            ("size", b"3"),
            ("uid", b"70000"),
            ("SCHILY.xattr.user.note", b"a\nb"),
            ("SCHILY.xattr.security.capability", b"x"),
            ("SCHILY.xattr.user.", b"x"),
            ("SCHILY.xattr.user.empty", b""),
            ("comment", b"x"),
        ])
        .file("x", "abc")
        .file("y", "Y");
    let mut memory = Memory::default();
    let (rule, limits) = (PermissionsRule::Preserve, Limits::default());
    unpack(&*tar.end(), &IMAGE, rule, &limits, &mut memory).unwrap();
    assert_eq!(memory.lines(), [format!("{long}=abc"), "y=Y".into()]);
    let metadata = &memory.entries[0].metadata;
    assert_eq!((metadata.modified.seconds, metadata.modified.nanoseconds), (-2, 500_000_000));
    assert_eq!(metadata.permissions.uid, 70000);
    let attributes: Vec<_> = metadata.extended_attributes.iter().collect();
    assert_eq!(attributes, [(&b"user.note"[..], &b"a\nb"[..])]);
    assert!(memory.entries[1].metadata.extended_attributes.is_empty());
}

#[test]
fn gnu_long_names_and_global_headers() {
    let (name, target) = (format!("d/{}", "n".repeat(150)), "t".repeat(150));
    let with_nul = |text: &str| format!("{text}\0").into_bytes();
    let extended = |tar: Tar, kind, content: &[u8]| {
        tar.member(Tar::header(b"././@LongLink", kind, content.len() as u64), content)
    };
    let tar = extended(Tar::new(), b'g', b"52 comment=0000000000000000000000000000000000000000\n");
    let tar = extended(tar, b'L', &with_nul(&name));
    let tar = extended(tar, b'K', &with_nul(&target));
    let tar = tar.link(b'2', "short", "short");
    assert_eq!(lines(&tar.end()), [format!("{name}->{target}")]);
}

#[test]
fn archives_of_old_writers_are_read() {
    let folder = Tar::header(b"old/", 0, 0);
    let mut no_type = Tar::header(b"f", 0, 1);
    no_type.as_ustar_mut().unwrap().magic = [0; 6];
    assert_eq!(lines(&Tar::new().member(folder, b"").member(no_type, b"x").end()), ["old/", "f=x"]);
    // The size of a link is ignored.
    let mut link = Tar::header(b"l", b'1', 100);
    link.as_old_mut().linkname[0] = b'f';
    assert_eq!(lines(&Tar::new().file("f", "").member(link, b"").end()), ["f=", "l=>f"]);
}

#[test]
fn ambiguous_extended_headers_are_corrupt() {
    let malformed = Tar::new().member(Tar::header(b"p", b'x', 5), b"9 a=b").file("x", "").end();
    let number = Tar::new().pax(&[("size", b"1e3")]).file("x", "").end();
    for tar in [malformed, number] {
        assert_eq!(refusal(&tar).class(), Class::Corrupt);
    }
}

#[test]
fn the_last_extended_header_before_an_entry_counts() {
    let extended = |tar: Tar, kind, content: &[u8]| {
        tar.member(Tar::header(b"././@LongLink", kind, content.len() as u64), content)
    };
    // A header replaces the one before it, with all its records.
    let twice = Tar::new().pax(&[("path", b"a"), ("size", b"1")]).pax(&[("mtime", b"5")]);
    assert_eq!(lines(&twice.file("x", "X").end()), ["x=X"]);
    let twice = Tar::new().pax(&[("path", b"a")]).pax(&[("path", b"b")]);
    assert_eq!(lines(&twice.file("x", "").end()), ["b="]);
    let names = extended(extended(Tar::new(), b'L', b"first\0"), b'L', b"second\0");
    let names = extended(extended(names, b'K', b"one\0"), b'K', b"two\0");
    assert_eq!(lines(&names.link(b'2', "x", "y").end()), ["second->two"]);
    assert_eq!(lines(&extended(Tar::new(), b'L', b"\0").file("x", "").end()), ["x="]);
    // A global header ends what stands before it, and so does the end of the archive.
    for global in [&b""[..], b"12 comment=\n"] {
        let lost = extended(Tar::new().pax(&[("path", b"a")]), b'g', global);
        let lost = extended(extended(lost, b'L', b"long\0"), b'g', global);
        assert_eq!(lines(&lost.file("x", "").end()), ["x="]);
    }
    assert_eq!(lines(&Tar::new().file("x", "").pax(&[("path", b"a")]).end()), ["x="]);
    assert_eq!(lines(&Tar::new().file("x", "").pax(&[("path", b"a")]).bytes), ["x="]);
}

#[test]
fn the_headers_before_one_entry_are_bounded() {
    let after = |headers: usize| {
        let tar = (0..headers).fold(Tar::new(), |tar, _| tar.pax(&[("path", b"a")]));
        tar.file("x", "").end()
    };
    assert_eq!(lines(&after(63)), ["a="]);
    assert!(matches!(refusal(&after(64)), UnpackError::Archive { .. }));
}

#[test]
fn a_negative_size_matters_only_where_it_is_used() {
    let with_size = |kind| {
        let mut header = Tar::header(b"e", kind, 0);
        header.as_old_mut().linkname[0] = b'f';
        header.as_old_mut().size = [0xff; 12];
        Tar::new().file("f", "F").member(header, b"").file("g", "G").end()
    };
    for kind in *b"123456" {
        let (unpacked, memory) = unpack_all(&with_size(kind), &IMAGE, &Limits::default());
        unpacked.expect("unpacked");
        assert_eq!(memory.lines().len(), 3);
    }
    for kind in *b"07xLKg" {
        let refused = refusal(&with_size(kind));
        assert!(matches!(refused, UnpackError::Archive { .. }), "{refused:?}");
    }
    let of_pax = |tar: Tar| tar.pax(&[("size", b"-1")]);
    assert_eq!(lines(&of_pax(Tar::new()).folder("d/", 0o755).end()), ["d/"]);
    assert_eq!(refusal(&of_pax(Tar::new()).file("x", "").end()).class(), Class::Corrupt);
}

#[test]
fn extended_headers_take_bounded_memory() {
    for kind in *b"xLK" {
        let tar = Tar::new().member(Tar::header(b"x", kind, 1 << 40), b"").bytes;
        let error = refusal(&tar);
        assert!(matches!(error, UnpackError::HeaderTooLarge { .. }), "{error:?}");
    }
}

#[test]
fn sizes_over_the_limit_are_refused_before_a_file_is_stored() {
    let mut negative = Tar::header(b"f", b'0', 0);
    negative.as_old_mut().size = [0xff; 12];
    assert_eq!(refusal(&Tar::new().member(negative, b"").end()).class(), Class::Corrupt);
    let pax = Tar::new().pax(&[("size", b"9223372036854775807")]).file("x", "").end();
    assert!(matches!(refusal(&pax), UnpackError::TooManyBytes { .. }));
}

#[test]
fn extended_attributes_are_bounded() {
    let limits =
        Limits { extended_attributes: 2, extended_attribute_bytes: 100, ..Limits::default() };
    let outcome = |records: &[(&str, &[u8])]| {
        unpack_all(&Tar::new().pax(records).file("x", "").end(), &IMAGE, &limits).0
    };
    assert!(outcome(&[("SCHILY.xattr.user.a", b"1"), ("SCHILY.xattr.user.b", b"2")]).is_ok());
    let name = format!("SCHILY.xattr.user.{}", "n".repeat(251));
    for records in [
        &[
            ("SCHILY.xattr.user.a", &b"1"[..]),
            ("SCHILY.xattr.user.b", b"2"),
            ("SCHILY.xattr.user.c", b"3"),
        ][..],
        &[("SCHILY.xattr.user.a", &[1; 100])],
        &[(&name, b"1")],
        &[("SCHILY.xattr.user.a\0b", b"1")],
    ] {
        let error = outcome(records).unwrap_err();
        assert!(matches!(error, UnpackError::ExtendedAttributes { .. }), "{error:?}");
    }
}

#[test]
fn entries_are_bounded() {
    let limits = Limits { entries: 2, ..Limits::default() };
    let error = unpack_all(&small().end(), &IMAGE, &limits).0.unwrap_err();
    assert!(matches!(error, UnpackError::TooManyEntries { limit: 2 }));
}

#[test]
fn bytes_are_bounded_after_the_archive_too() {
    let limits = Limits { unpacked_bytes: 10_000, ..Limits::default() };
    let mut tar = small().end();
    tar.extend([0; 10_000]);
    let error = unpack_all(&gzip(&tar), &IMAGE, &limits).0.unwrap_err();
    assert!(matches!(error, UnpackError::TooManyBytes { limit: 10_000 }));
}

#[test]
fn a_bomb_is_refused_by_its_ratio() {
    let limits = Limits { decompression_ratio_floor: 1 << 20, ..Limits::default() };
    let zeros = Tar::new().file("f", &"\0".repeat(4 << 20)).end();
    for packed in [gzip(&zeros), zstd(&zeros)] {
        let error = unpack_all(&packed, &IMAGE, &limits).0.unwrap_err();
        assert!(matches!(error, UnpackError::Ratio { limit: 200 }), "{error:?}");
        assert_eq!(error.class(), Class::Refused);
        // The ratio does not count below the floor.
        unpack_all(&packed, &IMAGE, &Limits::default()).0.unwrap();
    }
}

#[test]
fn a_zstd_window_over_the_limit_is_refused() {
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(28).unwrap();
    encoder.include_contentsize(false).unwrap();
    io::Write::write_all(&mut encoder, &small().end()).unwrap();
    let packed = encoder.finish().unwrap();
    assert!(matches!(refusal(&packed), UnpackError::Decompress(_)));
    let wide = Limits { zstd_window_log: 28, ..Limits::default() };
    unpack_all(&packed, &IMAGE, &wide).0.unwrap();
}

#[test]
fn failures_of_the_reader_and_the_sink_are_neither_corrupt_nor_refused() {
    struct Failing<'a>(&'a [u8]);
    impl Read for Failing<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match self.0.read(buffer)? {
                0 => Err(io::Error::other("the cable")),
                read => Ok(read),
            }
        }
    }
    struct Full;
    impl Sink for Full {
        fn file(&mut self, _: &FileHeader, _: &mut dyn BufRead) -> io::Result<StoredContent> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn entry(&mut self, _: Entry) -> io::Result<()> {
            Ok(())
        }
    }
    let (rule, limits) = (PermissionsRule::Readable, Limits::default());
    let tar = Tar::new().file("f", &"x".repeat(100_000)).end();
    for bytes in [&tar[..2], &tar[..700], &gzip(&tar)[..], &zstd(&tar)[..], &gzip(&tar)[..50]] {
        let outcome = unpack(Failing(bytes), &IMAGE, rule, &limits, &mut Memory::default());
        let Err(UnpackError::Read(error)) = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(error.to_string(), "the cable");
    }
    let outcome = unpack(&*tar, &IMAGE, rule, &limits, &mut Full);
    let Err(UnpackError::Store(error)) = outcome else {
        panic!("{outcome:?}");
    };
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
}

#[test]
fn a_sink_that_reads_only_half_loses_no_entry() {
    struct Half(Vec<String>);
    impl Sink for Half {
        fn file(&mut self, _: &FileHeader, content: &mut dyn BufRead) -> io::Result<StoredContent> {
            content.read_exact(&mut [0; 10])?;
            Ok(StoredContent { data: 0, checksum: Checksum::of(b"") })
        }
        fn entry(&mut self, entry: Entry) -> io::Result<()> {
            self.0.push(entry.path.to_string());
            Ok(())
        }
    }
    let tar = Tar::new().file("a", &"x".repeat(2000)).file("b", &"y".repeat(2000)).end();
    let mut half = Half(Vec::new());
    unpack(&*tar, &IMAGE, PermissionsRule::Readable, &Limits::default(), &mut half).unwrap();
    assert_eq!(half.0, ["a", "b"]);
}

#[test]
fn archives_of_the_tar_crate_are_read() {
    let mut builder = tar::Builder::new(Vec::new());
    let deep = format!("{}/file", "folder".repeat(30));
    let mut header = tar::Header::new_gnu();
    header.set_size(4);
    header.set_mode(0o755);
    builder.append_data(&mut header, &deep, &b"data"[..]).unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    builder.append_link(&mut header, "link", format!("{deep}2")).unwrap();
    let tar = builder.into_inner().unwrap();
    assert_eq!(lines(&tar), [format!("{deep}=data"), format!("link->{deep}2")]);
}

/// Returns limits under which every test is fast.
fn tiny() -> Limits {
    Limits {
        entries: 50,
        unpacked_bytes: 1 << 20,
        header_bytes: 4096,
        zstd_window_log: 20,
        ..Limits::default()
    }
}

proptest! {
    #[test]
    fn mutated_archives_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
        cut in prop::option::of(any::<prop::sample::Index>()),
        form in 0..3,
        fix_checksums in any::<bool>(),
    ) {
        let mut bytes = SPARSE_FORMS
            .iter()
            .fold(small(), |tar, form| Tar { bytes: [tar.bytes, sparse_file(form).bytes].concat() })
            .pax(&[("path", b"long"), ("mtime", b"1.5"), ("SCHILY.xattr.user.a", b"b")])
            .file("x", "content")
            .link(b'1', "hard", "x")
            .file("d/.wh.y", "")
            .end();
        let mutate = |bytes: &mut Vec<u8>| {
            for (index, value) in &changes {
                let index = index.index(bytes.len());
                bytes[index] = *value;
            }
            if let Some(cut) = &cut {
                bytes.truncate(cut.index(bytes.len()));
            }
        };
        if form == 0 || fix_checksums {
            mutate(&mut bytes);
        }
        if fix_checksums {
            for block in bytes.chunks_exact_mut(512).filter(|block| &block[257..262] == b"ustar") {
                let mut header = Header::new_old();
                header.as_mut_bytes().copy_from_slice(block);
                header.set_cksum();
                block.copy_from_slice(header.as_bytes());
            }
        }
        let mut packed = match form {
            0 => bytes,
            1 => gzip(&bytes),
            _ => zstd(&bytes),
        };
        if form != 0 && !fix_checksums {
            mutate(&mut packed);
        }
        for rule in [&IMAGE, &ARTIFACT] {
            let (result, memory) = unpack_all(&packed, rule, &tiny());
            if let Err(error) = &result {
                prop_assert!(error.to_string().len() < 1024);
                prop_assert!(error.class() != Class::Io);
            }
            for entry in &memory.entries {
                prop_assert!(entry.metadata.permissions.mode <= 0o777);
                prop_assert!(entry.path.components().all(|name| name != b".." && name != b"."));
                prop_assert!(!entry.path.as_bytes().starts_with(b"/"));
            }
        }
    }
}

#[test]
fn an_image_may_pass_through_its_own_links() {
    let tar = Tar::new().link(b'2', "l", "/d").file("l/x", "X").end();
    assert_eq!(lines(&tar), ["l->/d", "l/x=X"]);
}

#[test]
fn entries_of_an_artifact_through_its_own_links_are_refused_while_unpacking() {
    let refusal = |tar: &[u8]| unpack_all(tar, &ARTIFACT, &Limits::default()).0.unwrap_err();
    let through = [
        Tar::new().link(b'2', "l", "inside").file("l/x", ""),
        Tar::new().link(b'2', "d/l", "/etc").folder("d/l/deep/er/", 0o755),
    ];
    for archive in through {
        assert!(matches!(refusal(&archive.end()), UnpackError::ThroughOwnLink { .. }));
    }
    // A replaced link no longer counts.
    let replaced = Tar::new().link(b'2', "l", "/etc").folder("l/", 0o755).file("l/x", "");
    unpack_all(&replaced.end(), &ARTIFACT, &Limits::default()).0.expect("accepted");
}

#[test]
fn metadata_beyond_the_limit_is_refused_for_the_layer_and_for_the_artifact() {
    let limits = Limits { metadata_bytes: 8192, ..Limits::default() };
    let archive = |entries: usize| {
        let name = |number: usize| format!("{number:090}");
        (0..entries).fold(Tar::new(), |tar, number| tar.file(&name(number), "")).end()
    };
    let error = unpack_all(&archive(100), &IMAGE, &limits).0;
    assert!(matches!(error, Err(UnpackError::TooMuchMetadata { limit: 8192 })));
    let (whole, memory) = unpack_all(&archive(60), &IMAGE, &limits);
    whole.expect("below the limit");
    let everything = crate::Selection::default();
    let mut merger = crate::layer_merge::Merger::new(&limits, &everything);
    let mut outcome = Ok(());
    for layer in 0..2 {
        merger.archive(layer, &IMAGE);
        for entry in &memory.entries {
            outcome = outcome.and_then(|()| merger.entry(entry));
        }
    }
    assert!(matches!(outcome, Err(UnpackError::TooMuchMetadata { .. })));
}

#[test]
fn a_name_that_ends_in_a_slash_is_a_folder_in_old_archives_and_a_file_in_others() {
    let archive = |kind: u8, size, content: &[u8]| {
        let header = Tar::header(b"folder/", kind, size);
        Tar::new().member(header, content).file("folder/file", "x").end()
    };
    assert_eq!(lines(&archive(0, 0, b"")), ["folder/", "folder/file=x"]);
    for kind in *b"07" {
        assert_eq!(lines(&archive(kind, 0, b"")), ["folder=", "folder/file=x"]);
        assert_eq!(lines(&archive(kind, 1, b"y")), ["folder=y", "folder/file=x"]);
    }
    let refused = refusal(&archive(0, 1, b"x"));
    assert!(matches!(refused, UnpackError::Archive { .. }), "{refused:?}");
}
