#include "server.h"

#include <algorithm>
#include <csignal>
#include <iostream>
#include <memory>
#include <sstream>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/experimental/awaitable_operators.hpp>

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using namespace asio::experimental::awaitable_operators;
using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

namespace {

constexpr size_t kHeaderBytes = 8 << 10, kBodyBytes = 64 << 10;
constexpr char kHealth[] = "/health", kMetrics[] = "/metrics", kGenerate[] = "/v1/images/generations";
constexpr auto kNoThrow = asio::as_tuple(asio::use_awaitable);

http::response<http::string_body> respond(const Answer& answer, const char* type = "application/json") {
  http::response<http::string_body> response(static_cast<http::status>(answer.status), 11, answer.body);
  response.set(http::field::content_type, type);
  if (answer.status == 429 || answer.status == 503) response.set(http::field::retry_after, "1");
  return response;
}

http::response<http::string_body> refuse(unsigned status, const std::string& message) {
  return respond(error_answer(std::make_exception_ptr(Refusal(status, message))));
}

// What to say to a request that could not be read; 0: nothing, its sender is gone.
unsigned status_of(const beast::error_code& error) {
  if (error == http::error::body_limit) return 413;
  if (error == http::error::header_limit || error == http::error::buffer_overflow) return 431;
  if (error == asio::error::timed_out) return 408;
  if (error == http::error::end_of_stream || error == http::error::partial_message) return 0;
  return error.category() == beast::error_code(http::error::end_of_stream).category() ? 400 : 0;
}

// Reads or writes, or ends with timed_out.
asio::awaitable<beast::error_code> within(std::chrono::seconds time,
                                          asio::awaitable<std::tuple<beast::error_code, size_t>> operation) {
  asio::steady_timer timer(co_await asio::this_coro::executor, time);
  const auto first = co_await (std::move(operation) || timer.async_wait(kNoThrow));
  co_return first.index() == 0 ? std::get<0>(std::get<0>(first)) : asio::error::timed_out;
}

// Ends when the client hangs up, or sends more than the buffer takes. What it sends, its next request, stays there.
asio::awaitable<void> hangs_up(asio::ip::tcp::socket& socket, beast::flat_buffer& buffer) {
  while (buffer.size() < buffer.max_size()) {
    const auto space = buffer.prepare(std::min<size_t>(4096, buffer.max_size() - buffer.size()));
    const auto [error, count] = co_await socket.async_read_some(space, kNoThrow);
    if (error) co_return;
    buffer.commit(count);
  }
}

// The path if it is one of ours, or nothing.
std::string route(const http::request<http::string_body>& request) {
  const std::string path(request.target().substr(0, request.target().find('?')));
  return path == kHealth || path == kMetrics || path == kGenerate ? path : "";
}

// Closing a socket with unread input resets the connection, and the client may lose its answer: read that first.
asio::awaitable<void> close(asio::ip::tcp::socket& socket, beast::flat_buffer& buffer) {
  beast::error_code ignored;
  socket.shutdown(asio::ip::tcp::socket::shutdown_send, ignored);
  asio::steady_timer timer(socket.get_executor(), 1s);
  for (bool open = true; open;) {
    buffer.clear();
    const auto got = co_await (socket.async_read_some(buffer.prepare(4096), kNoThrow) || timer.async_wait(kNoThrow));
    open = got.index() == 0 && !std::get<0>(std::get<0>(got));
  }
}

}  // namespace

// The searches of one request. `over` expires when `answer` is there.
struct Server::Call {
  std::vector<flowfast::Request> searches;
  asio::steady_timer over;
  std::vector<flowfast::Handle> handles = {};
  Answer answer = {};
};

// While one lives there is somebody to answer: draining waits for it.
struct Server::Answering {
  explicit Answering(Server& server) : server(server) { ++server.answering_; }
  ~Answering() {
    if (--server.answering_ == 0 && server.draining_) server.io_.stop();
  }
  Answering(const Answering&) = delete;
  Server& server;
};

Server::Server(flowfast::Searcher& searcher, const Settings& settings)
    : searcher_(searcher),
      settings_(settings),
      capacity_(std::stoll(searcher.info().at("slots")) + settings.queue),
      limits_{.model = searcher.info().at("model"),
              .size = searcher.info().contains("size") ? searcher.info().at("size") : "",
              .budget = settings.budget ? settings.budget : std::stoll(searcher.info().at("budget_max")),
              .most_images = std::min<int64_t>(10, capacity_)},
      waiters_(static_cast<size_t>(capacity_)) {
  const std::string &least = searcher.info().at("budget_min"), &most = searcher.info().at("budget_max");
  if (limits_.budget < std::stoll(least) || limits_.budget > std::stoll(most))
    throw flowfast::OptionError("--budget must be from " + least + " to " + most + ", as the archive says, got " +
                                std::to_string(limits_.budget));
  try {
    const asio::ip::tcp::endpoint endpoint(asio::ip::make_address(settings.host), settings.port);
    acceptor_.open(endpoint.protocol());
    acceptor_.set_option(asio::socket_base::reuse_address(true));
    acceptor_.bind(endpoint);
    acceptor_.listen();
  } catch (const boost::system::system_error& error) {
    throw flowfast::OptionError("cannot listen at " + settings.host + " port " + std::to_string(settings.port) + ": " +
                                error.code().message() + "; choose with --host (an IP address) and --port");
  }
  signals_.add(SIGTERM);
  signals_.add(SIGINT);
}

std::string Server::address() const {
  std::ostringstream out;
  out << "http://" << acceptor_.local_endpoint();
  return out.str();
}

void Server::run() {
  signals_.async_wait([this](beast::error_code, int) { drain(); });
  asio::co_spawn(io_, accept(), asio::detached);
  io_.run();
  waiters_.join();
}

void Server::drain() {
  signals_.clear();  // another signal ends the process at once
  draining_ = true;
  if (answering_ == 0) io_.stop();
}

Server::Task<void> Server::accept() {
  for (;;) {
    auto [error, socket] = co_await acceptor_.async_accept(kNoThrow);
    if (error) {  // no descriptor is left, as a rule: one may be in a moment
      asio::steady_timer pause(io_, 100ms);
      co_await pause.async_wait(asio::use_awaitable);
      continue;
    }
    asio::co_spawn(io_, serve(std::move(socket)), [](const std::exception_ptr& error) {
      if (error) std::cerr << "a connection was lost: " << error_answer(error).body << std::endl;
    });
  }
}

// A connection: request, answer, request, answer, ...
Server::Task<void> Server::serve(Socket socket) {
  beast::error_code ignored;
  socket.set_option(asio::ip::tcp::no_delay(true), ignored);  // a large answer goes out at once
  Buffer buffer(kHeaderBytes + kBodyBytes);
  for (bool open = true; open;) {
    Parser parser;
    parser.header_limit(kHeaderBytes);
    parser.body_limit(kBodyBytes);
    const beast::error_code error = co_await read(parser, socket, buffer);
    if (error && (status_of(error) == 0 || !parser.got_some())) co_return;

    const Request& request = parser.get();
    const Answering until_sent(*this);
    std::optional<Response> response;
    if (error)
      response = refuse(status_of(error), error.message());
    else
      response = co_await answer(request, socket, buffer);
    if (!response) {
      metrics_.cancelled();
      co_return;
    }
    open = !error && !draining_ && request.keep_alive();
    if (!error) response->version(request.version());
    if (request.method() == http::verb::head) response->body().clear();
    response->keep_alive(open);
    response->prepare_payload();
    metrics_.answered(error ? "" : route(request), response->result_int());
    if (co_await within(settings_.client_seconds, http::async_write(socket, *response, kNoThrow))) co_return;
    if (!open) co_await close(socket, buffer);
  }
}

Server::Task<beast::error_code> Server::read(Parser& parser, Socket& socket, Buffer& buffer) {
  const std::chrono::seconds time = settings_.client_seconds;
  beast::error_code error = co_await within(time, http::async_read_header(socket, buffer, parser, kNoThrow));
  if (!error && beast::iequals(parser.get()[http::field::expect], "100-continue")) {
    const http::response<http::empty_body> go_on(http::status::continue_, 11);
    error = co_await within(time, http::async_write(socket, go_on, kNoThrow));
  }
  if (!error) error = co_await within(time, http::async_read(socket, buffer, parser, kNoThrow));
  co_return error;
}

Server::Task<std::optional<Server::Response>> Server::answer(const Request& request, Socket& socket, Buffer& buffer) {
  const std::string path = route(request);
  if (path.empty())
    co_return refuse(404, std::string("no such path: choose of ") + kHealth + ", " + kMetrics + ", " + kGenerate);
  const http::verb method = path == kGenerate ? http::verb::post : http::verb::get;
  if (request.method() != method) {
    const std::string name(http::to_string(method));
    Response response = refuse(405, path + " wants " + name);
    response.set(http::field::allow, name);
    co_return response;
  }
  if (path == kHealth)
    co_return respond(draining_ ? Answer{503, R"({"status":"draining"})"} : Answer{200, R"({"status":"ok"})"});
  if (path == kMetrics) {
    const int64_t running = searcher_.running();
    co_return respond({200, metrics_.text(under_way_ - running, running)}, "text/plain; version=0.0.4");
  }
  co_return co_await generate(request, socket, buffer);
}

Server::Task<std::optional<Server::Response>> Server::generate(const Request& request, Socket& socket, Buffer& buffer) {
  const Clock::time_point begin = Clock::now();
  if (draining_) co_return refuse(503, "the server is shutting down: ask another one");
  const auto type = request[http::field::content_type];
  if (!beast::iequals(type.substr(0, type.find(';')), "application/json"))
    co_return refuse(415, "the Content-Type must be application/json");

  auto call = std::make_shared<Call>(Call{{}, asio::steady_timer(io_, Clock::time_point::max())});
  try {
    call->searches = read_request(request.body(), limits_);
    if (under_way_ + std::ssize(call->searches) > capacity_) throw Refusal(429, "the queue is full: come back later");
    for (const auto& search : call->searches) call->handles.push_back(searcher_.submit(search));
  } catch (...) {
    co_return respond(error_answer(std::current_exception()));
  }
  under_way_ += std::ssize(call->searches);
  asio::post(waiters_, [this, call] {
    call->answer = collect(call->searches, call->handles);
    asio::post(io_, [this, call] {
      under_way_ -= std::ssize(call->searches);
      call->over.expires_at(Clock::time_point::min());
    });
  });

  const auto first = co_await (call->over.async_wait(kNoThrow) || hangs_up(socket, buffer));
  if (first.index() == 1) {
    for (const auto& handle : call->handles) handle.cancel();
    co_await call->over.async_wait(kNoThrow);
    co_return std::nullopt;
  }
  if (call->answer.status == 200)
    metrics_.finished(std::chrono::duration<double>(Clock::now() - begin).count(), call->answer.nfe);
  co_return respond(call->answer);
}
