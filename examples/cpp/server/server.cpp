#include "server.h"

#include <algorithm>
#include <charconv>
#include <csignal>
#include <iostream>
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
constexpr char kHealth[] = "/health", kMetrics[] = "/metrics", kGenerate[] = "/v1/images/generations",
               kModels[] = "/v1/models";
constexpr auto kHeadTime = 1s, kPingTime = 5s;
constexpr char kStream[] =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-store\r\nX-Accel-Buffering: no\r\n"
    "Connection: close\r\n\r\n";
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

std::string path_of(const http::request<http::string_body>& request) {
  return request.target().substr(0, request.target().find('?'));
}

// The path if it is one of ours, or nothing.
std::string route(const std::string& path) {
  if (path.starts_with(std::string(kModels) + "/")) return kModels;
  return path == kHealth || path == kMetrics || path == kModels || path == kGenerate ? path : "";
}

// What follows the route of a model, its %2F and the like decoded.
std::string name_in(const std::string& path) {
  std::string name;
  for (size_t i = sizeof(kModels); i < path.size(); ++i) {
    unsigned code = 0;
    const char* digits = path.data() + i + 1;
    const bool is_code = path[i] == '%' && i + 2 < path.size() &&
                         std::from_chars(digits, digits + 2, code, 16).ptr == digits + 2;
    name += is_code ? static_cast<char>(code) : path[i];
    if (is_code) i += 2;
  }
  return name;
}

Offer offer_of(const std::map<std::string, std::string>& info, const Settings& settings, int64_t capacity) {
  const int64_t least = std::stoll(info.at("budget_min")), most = std::stoll(info.at("budget_max"));
  if (settings.budget && std::clamp(settings.budget, least, most) != settings.budget)
    throw flowfast::OptionError("--budget must be from " + info.at("budget_min") + " to " + info.at("budget_max") +
                                ", as the archive says, got " + std::to_string(settings.budget));
  Offer offer{.model = info.at("model"),
              .size = info.contains("size") ? info.at("size") : "",
              .method = info.at("method"),
              .micro_batch = std::stoll(info.at("micro_batch")),
              .transitions = std::stoll(info.at("transitions")),
              .most_images = std::min<int64_t>(10, capacity)};
  for (const auto& [name, nfe] : settings.quality) offer.quality[name] = std::clamp(nfe, least, most);
  if (offer.quality.contains("high")) offer.quality["hd"] = offer.quality["high"];
  const std::string usual = offer.quality.contains("medium") ? "medium" : settings.quality.at(0).first;
  offer.quality["standard"] = offer.quality[usual];
  offer.quality["auto"] = settings.budget ? settings.budget : offer.quality[usual];
  return offer;
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

// The searches of one request. Its last four members are those of the thread of HTTP.
struct Server::Call {
  Asked asked;
  std::vector<flowfast::Handle> handles = {};
  asio::steady_timer news;
  std::string events = {};  // of its stream, not sent yet
  Answer answer = {};       // once it is over
  bool over = false;

  // Until there are events or it is over, or for so long.
  Task<void> wait(Clock::duration time) {
    if (over || !events.empty()) co_return;
    news.expires_after(time);
    co_await news.async_wait(kNoThrow);
  }

  Task<std::optional<Reply>> end() {
    news.expires_at(Clock::time_point::max());
    while (!over) co_await news.async_wait(kNoThrow);
    co_return respond(answer);
  }
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
      offer_(offer_of(searcher.info(), settings, capacity_)),
      waiters_(static_cast<size_t>(capacity_)) {
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
    std::optional<Reply> reply;
    if (error)
      reply = refuse(status_of(error), error.message());
    else
      reply = co_await answer(request, socket, buffer);
    if (!reply) {
      metrics_.cancelled();
      co_return;
    }
    Response& response = reply->response;
    open = !error && !draining_ && !reply->is_sent && request.keep_alive();
    if (!error) response.version(request.version());
    response.keep_alive(open);
    response.prepare_payload();
    if (request.method() == http::verb::head) response.body().clear();
    metrics_.answered(error ? "" : route(path_of(request)), response.result_int());
    if (!reply->is_sent && co_await within(settings_.client_seconds, http::async_write(socket, response, kNoThrow)))
      co_return;
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

Server::Task<std::optional<Server::Reply>> Server::answer(const Request& request, Socket& socket, Buffer& buffer) {
  const std::string path = path_of(request), place = route(path);
  if (place.empty())
    co_return refuse(404, "no such path: choose of /health, /metrics, /v1/models, /v1/images/generations");
  const bool is_get = request.method() == http::verb::get || request.method() == http::verb::head;
  if (place == kGenerate ? request.method() != http::verb::post : !is_get) {
    const std::string allowed = place == kGenerate ? "POST" : "GET, HEAD";
    Response response = refuse(405, place + " wants " + allowed);
    response.set(http::field::allow, allowed);
    co_return std::move(response);
  }
  if (place == kHealth)
    co_return respond(draining_ ? Answer{503, R"({"status":"draining"})"} : Answer{200, R"({"status":"ok"})"});
  if (place == kMetrics) {
    const int64_t running = searcher_.running();
    co_return respond({200, metrics_.text(under_way_ - running, running)}, "text/plain; version=0.0.4");
  }
  if (place == kGenerate) co_return co_await generate(request, socket, buffer);
  co_return respond(models(offer_, path == kModels ? "" : name_in(path), created_));
}

Server::Task<std::optional<Server::Reply>> Server::generate(const Request& request, Socket& socket, Buffer& buffer) {
  const Clock::time_point begun = Clock::now();
  if (draining_) co_return refuse(503, "the server is shutting down: ask another one");
  const auto type = request[http::field::content_type];
  if (!beast::iequals(type.substr(0, type.find(';')), "application/json"))
    co_return refuse(415, "the Content-Type must be application/json");

  auto call = std::make_shared<Call>(Call{.asked = {}, .news = asio::steady_timer(io_)});
  try {
    call->asked = read_request(request.body(), offer_);
    begin(call);
  } catch (...) {
    co_return respond(error_answer(std::current_exception()));
  }
  Task<std::optional<Reply>> answering = call->asked.stream ? stream(*call, socket) : call->end();
  auto first = co_await (std::move(answering) || hangs_up(socket, buffer));
  std::optional<Reply> reply;
  if (first.index() == 0) reply = std::move(std::get<0>(first));
  if (!reply)
    for (const auto& handle : call->handles) handle.cancel();
  co_await call->end();
  if (reply && call->answer.status == 200)
    metrics_.finished(std::chrono::duration<double>(Clock::now() - begun).count(), call->answer.nfe);
  co_return reply;
}

// What goes wrong within the first second has a status of its own; later it is the last event.
Server::Task<std::optional<Server::Reply>> Server::stream(Call& call, Socket& socket) {
  co_await call.wait(kHeadTime);
  if (call.over && call.answer.status != 200) co_return respond(call.answer);
  std::string text = kStream;
  for (;;) {
    const bool last = call.over;
    text += std::exchange(call.events, {});
    if (last && call.answer.status != 200)
      text += "event: error\ndata: {\"type\":\"error\"," + call.answer.body.substr(1) + "\n\n";
    if (co_await within(settings_.client_seconds, asio::async_write(socket, asio::buffer(text), kNoThrow)))
      co_return std::nullopt;
    if (last) co_return Reply(respond({}), true);
    co_await call.wait(kPingTime);
    text = call.over || !call.events.empty() ? "" : ": wait\n\n";
  }
}

// Submits its searches. A thread waits for them, and what it and the model's thread have to tell goes to that of HTTP.
void Server::begin(const std::shared_ptr<Call>& call) {
  const std::vector<flowfast::Request>& searches = call->asked.searches;
  if (under_way_ + std::ssize(searches) > capacity_) throw Refusal(429, "the queue is full: come back later");
  for (size_t i = 0; i < searches.size(); ++i) call->handles.push_back(searcher_.submit(searches[i], watch(call, i)));
  under_way_ += std::ssize(searches);
  asio::post(waiters_, [this, call] {
    Answer answer = collect(call->asked, call->handles, offer_,
                            [&](std::string event) { tell(call, std::move(event)); });
    asio::post(io_, [this, call, answer = std::move(answer)]() mutable {
      under_way_ -= std::ssize(call->asked.searches);
      call->answer = std::move(answer), call->over = true;
      call->news.cancel();
    });
  });
}

// Tells the pictures on the way. It runs, and makes the picture's file, in the model's thread; a search keeps it, and
// must not keep the call that keeps the search.
flowfast::OnProgress Server::watch(const std::shared_ptr<Call>& call, size_t index) {
  if (!call->asked.stream || call->asked.partial_images == 0) return {};
  return [this, weak = std::weak_ptr(call), looks = Looks(index)](const flowfast::Progress& now) mutable {
    const auto call = weak.lock();
    const std::string event = call ? looks.due(now, call->asked, offer_) : "";
    if (!event.empty()) tell(call, event);
  };
}

void Server::tell(std::shared_ptr<Call> call, std::string event) {
  asio::post(io_, [call = std::move(call), event = std::move(event)] {
    call->events += event;
    call->news.cancel();
  });
}
