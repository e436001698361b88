// The HTTP side: one thread, a coroutine a connection (Boost.Asio, Boost.Beast). The model runs in the Searcher's own
// thread; a pool of threads waits for its results, so nothing here ever blocks.
#pragma once

#include <chrono>
#include <cstdint>
#include <ctime>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <boost/asio.hpp>
#include <boost/beast.hpp>

#include "api.h"
#include "metrics.h"

struct Settings {
  std::string host = "127.0.0.1";
  uint16_t port = 8080;                     // 0: one that is free
  int64_t queue = 64;                       // searches that may wait for a slot; more are answered 429
  // NFE by low, medium, high; what is beyond the archive's budgets is the nearest of them.
  std::vector<std::pair<std::string, int64_t>> quality = {{"low", 50}, {"medium", 200}, {"high", 500}};
  int64_t budget = 0;                       // NFE of requests that name none, nor a quality; 0: as medium
  std::chrono::seconds client_seconds{10};  // for a client to send a request, or to take an answer
};

class Server {
 public:
  // Listens at once. Throws OptionError where it cannot.
  Server(flowfast::Searcher& searcher, const Settings& settings);

  // Serves until SIGTERM or SIGINT, and then until what had been asked is answered.
  void run();

  std::string address() const;

 private:
  using Request = boost::beast::http::request<boost::beast::http::string_body>;
  using Response = boost::beast::http::response<boost::beast::http::string_body>;
  using Socket = boost::asio::ip::tcp::socket;
  using Buffer = boost::beast::flat_buffer;
  template <class T>
  using Task = boost::asio::awaitable<T>;
  using Parser = boost::beast::http::request_parser<boost::beast::http::string_body>;
  struct Call;
  struct Answering;
  struct Reply {
    Reply(Response response, bool is_sent = false) : response(std::move(response)), is_sent(is_sent) {}
    Response response;
    bool is_sent;  // as a stream was
  };

  Task<void> accept();
  Task<void> serve(Socket socket);
  Task<boost::beast::error_code> read(Parser& parser, Socket& socket, Buffer& buffer);
  // No reply: the client is gone.
  Task<std::optional<Reply>> answer(const Request& request, Socket& socket, Buffer& buffer);
  Task<std::optional<Reply>> generate(const Request& request, Socket& socket, Buffer& buffer);
  Task<std::optional<Reply>> stream(Call& call, Socket& socket);
  void begin(const std::shared_ptr<Call>& call);
  flowfast::OnProgress watch(const std::shared_ptr<Call>& call, size_t index);
  void tell(std::shared_ptr<Call> call, std::string event);
  void drain();

  flowfast::Searcher& searcher_;
  const Settings settings_;
  const int64_t capacity_;  // searches under way: the archive's slots and the queue
  const Offer offer_;
  const int64_t created_ = std::time(nullptr);
  int64_t under_way_ = 0, answering_ = 0;
  bool draining_ = false;
  Metrics metrics_;
  boost::asio::io_context io_{1};
  boost::asio::ip::tcp::acceptor acceptor_{io_};
  boost::asio::signal_set signals_{io_};
  boost::asio::thread_pool waiters_;
};
