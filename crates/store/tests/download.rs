//! Downloads from a server on this machine that cuts, damages and resumes.

use engraft_store::hub::Hub;
use sha2::{Digest, Sha256};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// How the server treats the weights.
#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Good,
    /// Every answer stops after this many bytes and closes.
    Cut(usize),
    /// One bit is wrong.
    Flipped,
    /// A redirection to nowhere.
    Lost,
}

struct Server {
    mode: Mode,
    weights: Vec<u8>,
    ranges: Vec<String>,
}

fn start(mode: Mode) -> (String, Arc<Mutex<Server>>) {
    let weights: Vec<u8> = (0..100_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let server = Arc::new(Mutex::new(Server { mode, weights, ranges: Vec::new() }));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let shared = Arc::clone(&server);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || answer(stream, &shared));
        }
    });
    (endpoint, server)
}

fn answer(mut stream: TcpStream, shared: &Mutex<Server>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let path = first.split(' ').nth(1).unwrap_or("").to_owned();
    let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    let range =
        headers.iter().find_map(|h| h.to_lowercase().strip_prefix("range: bytes=").map(str::to_owned));
    let mut server = shared.lock().unwrap();
    if path == "/api/models/org/name/revision/main" {
        let body = format!(
            r#"{{"sha":"{COMMIT}","siblings":[{{"rfilename":"config.json"}},{{"rfilename":"model.safetensors"}},{{"rfilename":"../evil.json"}},{{"rfilename":"README.md"}}]}}"#
        );
        let _ = write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
        return;
    }
    let body = match path.rsplit('/').next() {
        Some("config.json") => b"{}".to_vec(),
        Some("model.safetensors") => server.weights.clone(),
        _ => {
            let _ =
                write!(stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            return;
        }
    };
    let is_weights = body.len() > 2;
    let etag = if is_weights { hex(&Sha256::digest(&body)) } else { "a".repeat(40) };
    let range = range.unwrap_or_else(|| "0-".into());
    let (from, to) = range.split_once('-').unwrap();
    let from: usize = from.parse().unwrap();
    let to = to.parse::<usize>().map_or(body.len(), |to| to + 1).min(body.len());
    let mut part = body[from.min(to)..to].to_vec();
    if server.mode == Mode::Lost {
        let _ = write!(
            stream,
            "HTTP/1.1 302 Found\r\nContent-Length: 0\r\nETag: \"{etag}\"\r\nx-repo-commit: {COMMIT}\r\nConnection: close\r\n\r\n"
        );
        return;
    }
    let announced = part.len();
    if is_weights && announced > 1 {
        server.ranges.push(range.clone());
        match server.mode {
            Mode::Cut(n) => part.truncate(n),
            Mode::Flipped => part[0] ^= 1,
            Mode::Good | Mode::Lost => {}
        }
    }
    let _ = write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nContent-Length: {announced}\r\nContent-Range: bytes {from}-{}/{}\r\nETag: \"{etag}\"\r\nx-repo-commit: {COMMIT}\r\nConnection: close\r\n\r\n",
        to.saturating_sub(1),
        body.len()
    );
    let _ = stream.write_all(&part);
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn resolve(cache: &Path, endpoint: &str) -> Result<std::path::PathBuf, String> {
    let hub = Hub { endpoint: endpoint.into(), ..Hub::new(cache.to_owned()) };
    let mut last = (0, 0);
    let found = hub.resolve("org/name", None, &mut |p| last = (p.done, p.total));
    if found.is_ok() {
        assert_eq!(last.0, last.1);
    }
    found.map_err(|e| e.to_string())
}

#[test]
fn a_good_download_is_cached_in_the_standard_form() {
    let cache = tempfile::tempdir().unwrap();
    let (endpoint, server) = start(Mode::Good);
    let snapshot = resolve(cache.path(), &endpoint).unwrap();
    let repository = cache.path().join("models--org--name");
    assert_eq!(snapshot, repository.join("snapshots").join(COMMIT));
    assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), server.lock().unwrap().weights);
    assert_eq!(std::fs::read_to_string(repository.join("refs/main")).unwrap(), COMMIT);
    assert!(snapshot.join("config.json").is_symlink() && !snapshot.join("README.md").exists());
    assert!(!repository.join(".engraft-partial").exists());
    let hub = Hub { offline: true, ..Hub::new(cache.path().to_owned()) };
    assert_eq!(hub.resolve("org/name", None, &mut |_| {}).unwrap(), snapshot);
}

#[test]
fn a_cut_download_is_refused_and_taken_up_again() {
    let cache = tempfile::tempdir().unwrap();
    let (endpoint, server) = start(Mode::Cut(15_000));
    let e = resolve(cache.path(), &endpoint).unwrap_err();
    assert!(e.contains("model.safetensors") && e.contains("goes on where it stopped"), "{e}");
    assert!(!cache.path().join("models--org--name/refs/main").exists());
    server.lock().unwrap().mode = Mode::Good;
    server.lock().unwrap().ranges.clear();
    let snapshot = resolve(cache.path(), &endpoint).unwrap();
    assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), server.lock().unwrap().weights);
    assert!(server.lock().unwrap().ranges.iter().all(|range| range != "0-"));
}

#[test]
fn a_damaged_download_is_refused_and_starts_anew() {
    let cache = tempfile::tempdir().unwrap();
    let (endpoint, server) = start(Mode::Flipped);
    let e = resolve(cache.path(), &endpoint).unwrap_err();
    assert!(e.contains("SHA-256"), "{e}");
    // A part as long as the file, from an attempt that was cut before its check, is no obstacle either.
    let blobs = cache.path().join("models--org--name/.engraft-partial/models--org--name/blobs");
    let name = hex(&Sha256::digest(&server.lock().unwrap().weights));
    std::fs::write(blobs.join(name).with_extension("part"), vec![0; 100_000]).unwrap();
    server.lock().unwrap().mode = Mode::Good;
    resolve(cache.path(), &endpoint).unwrap();
}

#[test]
fn an_unknown_model_says_what_to_check() {
    let cache = tempfile::tempdir().unwrap();
    let (endpoint, _) = start(Mode::Good);
    let hub = Hub { endpoint, ..Hub::new(cache.path().to_owned()) };
    let e = hub.resolve("org/nmae", None, &mut |_| {}).unwrap_err().to_string();
    assert!(e.contains("org/nmae") && e.contains("spelling"), "{e}");
}

#[test]
fn a_senseless_answer_is_an_error() {
    let cache = tempfile::tempdir().unwrap();
    let (endpoint, _) = start(Mode::Lost);
    let e = resolve(cache.path(), &endpoint).unwrap_err();
    assert!(e.contains("org/name"), "{e}");
    assert!(!cache.path().join("models--org--name/refs/main").exists());
}
