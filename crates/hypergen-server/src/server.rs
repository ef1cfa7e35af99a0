//! The server: an address, connections, and the way to the end. What is said
//! over a connection is the [`App`]'s business.
//!
//! It speaks HTTP/1.1, which is what OpenAI's clients and every proxy speak.
//! hyper reads on while a handler runs, so a closed (or half closed)
//! connection drops the handler at once, and with it its place in the queue; a
//! peer that vanished without a word is found by TCP's keep-alive. The one
//! case that is not seen is a client that sends more than its request (a second
//! one, say) before the answer, and then leaves: its request is drawn.

use std::net::{SocketAddr, TcpListener as StdListener, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use hypergen_diffusion::Generator;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_io_timeout::TimeoutStream;

use crate::app::{App, Shared, open_store};
use crate::banner;
use crate::config::ServeConfig;
use crate::error::ServeError;
use crate::signals;

/// Connections that the system keeps for us until we take them.
const BACKLOG: i32 = 1024;
/// Time between looks for pictures that are out of time.
const SWEEP: Duration = Duration::from_secs(10);
/// Time for the last answers to reach their clients.
const FLUSH: Duration = Duration::from_secs(5);
/// Pause after the system refused us a connection (too many open files).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Threads for encoding and for the disk, where each may hold a picture.
const BLOCKING_THREADS: usize = 16;
/// Silence after which a peer is asked whether it is still there.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// How a server ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Everybody was answered.
    Graceful,
    /// It was told twice, and stopped at once.
    Forced,
}

/// An address that is taken, and settings that are checked: all that can be
/// known to be right before a model is loaded, which may take a while.
#[derive(Debug)]
pub struct Server {
    config: ServeConfig,
    socket: socket2::Socket,
    address: SocketAddr,
}

impl Server {
    /// Takes the address. Nobody can connect before the model is there.
    ///
    /// # Errors
    /// When the settings do not go together, the folder for pictures cannot be
    /// written to, or the address is taken.
    pub fn bind(config: ServeConfig) -> Result<Self, ServeError> {
        config.check().map_err(ServeError::Config)?;
        // Only to find out that it can be: the application opens it for good.
        drop(open_store(&config)?);
        let shown = match config.host.contains(':') {
            true => format!("[{}]:{}", config.host.trim_matches(['[', ']']), config.port),
            false => format!("{}:{}", config.host, config.port),
        };
        let listen = |source| ServeError::Listen { address: shown.clone(), source };
        let address = shown.to_socket_addrs().map_err(listen)?.next().ok_or_else(|| {
            listen(std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address"))
        })?;
        let socket = bind(address).map_err(listen)?;
        let address = socket.local_addr().map_err(listen)?.as_socket().unwrap_or(address);
        Ok(Self { config, socket, address })
    }

    /// The address, with the port that was found if any was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until the process is told to stop (SIGTERM or SIGINT; a second
    /// one stops at once).
    ///
    /// # Errors
    /// When the settings do not fit the model, or the system refuses what a
    /// server needs.
    pub fn run(self, generator: Box<dyn Generator>) -> Result<Exit, ServeError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(BLOCKING_THREADS)
            .thread_name("http")
            .enable_all()
            .build()
            .map_err(ServeError::Thread)?;
        let exit = runtime.block_on(async {
            let stop = signals::listen().map_err(ServeError::Thread)?;
            self.run_until(generator, stop).await
        });
        // Encoding that nobody waits for any more must not hold up the end.
        runtime.shutdown_background();
        exit
    }

    /// Serves until `stop` says so: once to finish what runs, twice to drop
    /// everything.
    ///
    /// # Errors
    /// As [`Server::run`].
    pub async fn run_until(
        self,
        generator: Box<dyn Generator>,
        stop: UnboundedReceiver<()>,
    ) -> Result<Exit, ServeError> {
        let listen = |source| ServeError::Listen { address: self.address.to_string(), source };
        let app = App::new(&self.config, generator, self.address)?;
        self.socket.listen(BACKLOG).map_err(listen)?;
        let listener = TcpListener::from_std(StdListener::from(self.socket)).map_err(listen)?;
        banner::announce(&app.shared, &self.config);
        let sweeper = tokio::spawn(sweep(Arc::clone(&app.shared)));
        let shared = Arc::clone(&app.shared);
        let exit = Connections::new(app, &self.config).serve(listener, stop).await;
        sweeper.abort();
        // Tasks that are not done yet hold it too, and the process does not wait for them.
        shared.store.close();
        Ok(exit)
    }
}

fn bind(address: SocketAddr) -> std::io::Result<socket2::Socket> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
    // A restarted server must not wait for its predecessor's connections to fade.
    #[cfg(unix)]
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

async fn sweep(app: Arc<Shared>) {
    let mut interval = tokio::time::interval(SWEEP);
    loop {
        interval.tick().await;
        let app = Arc::clone(&app);
        // A sweep that fails is one that the next one makes up for.
        let _ = tokio::task::spawn_blocking(move || app.store.sweep()).await;
    }
}

/// All the connections, and their end.
struct Connections {
    app: App,
    places: Arc<Semaphore>,
    watched: GracefulShutdown,
    read_timeout: Duration,
    write_timeout: Duration,
    shutdown_timeout: Duration,
}

impl Connections {
    fn new(app: App, config: &ServeConfig) -> Self {
        Self {
            app,
            places: Arc::new(Semaphore::new(config.max_connections.min(Semaphore::MAX_PERMITS))),
            watched: GracefulShutdown::new(),
            read_timeout: config.read_timeout.0,
            write_timeout: config.write_timeout.0,
            shutdown_timeout: config.shutdown_timeout.0,
        }
    }

    async fn serve(self, listener: TcpListener, mut stop: UnboundedReceiver<()>) -> Exit {
        loop {
            tokio::select! {
                // `None`: nobody is left who could say stop, so it is time.
                _ = stop.recv() => break,
                (stream, place) = self.next(&listener) => self.open(stream, place),
            }
        }
        drop(listener);
        self.end(stop).await
    }

    /// The next connection, once there is a place for it.
    async fn next(&self, listener: &TcpListener) -> (TcpStream, OwnedSemaphorePermit) {
        loop {
            let Ok(place) = Arc::clone(&self.places).acquire_owned().await else {
                // The semaphore is never closed; if it were, nobody more could come.
                std::future::pending::<()>().await;
                continue;
            };
            match listener.accept().await {
                Ok((stream, _)) => return (stream, place),
                Err(e) => {
                    tracing::warn!(error = %e, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn open(&self, stream: TcpStream, place: OwnedSemaphorePermit) {
        // Without these the connection still works, only less well.
        let _ = stream.set_nodelay(true);
        let keepalive = socket2::TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 3);
        let _ = socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive);
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(self.write_timeout));
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.read_timeout)
            .serve_connection(TokioIo::new(Box::pin(stream)), TowerToHyperService::new(self.app.connected()));
        let connection = self.watched.watch(connection);
        let shared = Arc::clone(&self.app.shared);
        shared.connections.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            // Clients that leave or talk nonsense are everyday life.
            if let Err(e) = connection.await {
                tracing::debug!(error = %e, "a connection ended early");
            }
            shared.connections.fetch_sub(1, Ordering::Relaxed);
            drop(place);
        });
    }

    async fn end(self, mut stop: UnboundedReceiver<()>) -> Exit {
        let Self { app, watched, shutdown_timeout, .. } = self;
        tracing::info!(timeout = ?shutdown_timeout, "shutting down: what runs may finish, what waits is refused");
        app.drain();
        let finishing = async {
            let closed = watched.shutdown();
            tokio::pin!(closed);
            if tokio::time::timeout(shutdown_timeout, &mut closed).await.is_err() {
                tracing::warn!("what still runs is stopped");
                app.stop();
                // Whoever does not take the answer by then goes without.
                let _ = tokio::time::timeout(FLUSH, closed).await;
            }
        };
        tokio::select! {
            () = finishing => {
                tracing::info!("bye");
                Exit::Graceful
            }
            () = again(&mut stop) => {
                tracing::warn!("told twice: stopping at once");
                app.stop();
                Exit::Forced
            }
        }
    }
}

/// Returns when somebody says stop again; never if nobody can.
async fn again(stop: &mut UnboundedReceiver<()>) {
    if stop.recv().await.is_none() {
        std::future::pending::<()>().await;
    }
}
