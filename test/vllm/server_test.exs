defmodule VLLM.ServerTest do
  use ExUnit.Case, async: true
  doctest VLLM.Server, only: [child_spec: 1]
  doctest VLLM.Server.Head
  doctest VLLM.Server.Hosts

  import VLLM.FakeEngine
  import VLLM.HTTPClient, only: [connect: 1]
  import VLLM.OSProcess, only: [eventually: 1]

  alias VLLM.{Error, HTTPBytes, HTTPClient, Server}

  @moduletag :tmp_dir

  defp serve(options \\ []) do
    llm = start!()
    server = start_supervised!({Server, [models: [llm], port: 0] ++ options})
    {llm, URI.parse(Server.url(server)).port}
  end

  defp post(socket, steps, headers \\ []) do
    HTTPClient.post(
      socket,
      "/v1/completions",
      ~s({"model": "ready", "prompt": "#{steps}"}),
      headers
    )
  end

  # All of a request but its body, or the beginning of that.
  defp begin(socket, headers, body \\ "") do
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
    :ok = :gen_tcp.send(socket, [head, Enum.map(headers, &[&1, "\r\n"]), "\r\n", body])
    socket
  end

  # The processes of a server's connections.
  defp connections do
    {:ok, test} = ExUnit.fetch_test_supervisor()

    for {{Server, _port}, server, _, _} <- Supervisor.which_children(test),
        {:clients, clients, _, _} <- Supervisor.which_children(server),
        pid <- Task.Supervisor.children(clients),
        do: pid
  end

  # What has come when `ending` is there.
  defp read_until(socket, ending, read \\ "") do
    if String.ends_with?(read, ending) do
      read
    else
      {:ok, more} = :gen_tcp.recv(socket, 0, 20_000)
      read_until(socket, ending, read <> more)
    end
  end

  test "an answer in one piece, and others on the same connection" do
    {_llm, port} = serve()
    socket = connect(port)

    for word <- ["one", "two"] do
      answer = socket |> post("answer:200:#{word}") |> read_until(word)
      assert ["HTTP/1.1 200 OK", headers] = String.split(answer, "\r\n", parts: 2)
      assert headers =~ "content-length: 3\r\n"
      assert headers =~ "content-type: application/json\r\n"
    end
  end

  test "what a client sends before it has its answer waits for its turn" do
    {_llm, port} = serve()
    socket = connect(port)
    post(socket, "head:200;chunk:three;sleep:0.2;end")
    read_until(socket, "three\r\n")
    post(socket, "answer:200:four")
    assert read_until(socket, "four") =~ "0\r\n\r\nHTTP/1.1 200 OK"
  end

  test "a client that wants no more has its connection closed" do
    {_llm, port} = serve()
    socket = port |> connect() |> post("answer:200:one", ["connection: close"])
    assert read_until(socket, "one") =~ "connection: close\r\n"
    assert {:error, :closed} = :gen_tcp.recv(socket, 0, 20_000)
  end

  test "a stream comes as it is made" do
    {llm, port} = serve()
    socket = port |> connect() |> post("head:200;chunk:one;hold")
    begun = read_until(socket, "one\r\n")
    assert begun =~ "transfer-encoding: chunked\r\n"
    assert begun =~ "content-type: text/event-stream\r\n"
    # Nothing has ended it yet.
    await_held(llm, 1)
    socket = port |> connect() |> post("head:200;chunk:one;chunk:two;end")
    assert read_until(socket, "0\r\n\r\n") =~ "\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
    assert socket |> post("answer:200:yes") |> read_until("yes")
  end

  test "HEAD has the head of an answer, after which comes the next" do
    {_llm, port} = serve(api_keys: ["sk-secret"])
    socket = connect(port)
    head = &(:ok = :gen_tcp.send(socket, "HEAD #{&1} HTTP/1.1\r\nhost: localhost\r\n\r\n"))

    for {path, status, length} <- [{"/health", 200, "3"}, {"/metrics", 401, "\\d+"}] do
      head.(path)
      answer = read_until(socket, "\r\n\r\n")
      assert answer =~ ~r/\AHTTP\/1.1 #{status} .*\r\ncontent-length: #{length}\r\n/s
    end

    :ok = :gen_tcp.send(socket, "GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert "HTTP/1.1 200 OK" <> _ = read_until(socket, "\r\n\r\nok\n")
  end

  test "to a client of HTTP/1.0 a stream is what comes until the connection ends" do
    {_llm, port} = serve()
    body = ~s({"prompt": "head:200;chunk:one;chunk:two;end"})
    socket = connect(port)

    :ok =
      :gen_tcp.send(socket, """
      POST /v1/completions HTTP/1.0\r
      content-type: application/json\r
      content-length: #{byte_size(body)}\r
      \r
      #{body}\
      """)

    answer = read_until(socket, "onetwo")
    refute answer =~ "transfer-encoding"
    assert answer =~ "connection: close\r\n"
    assert {:error, :closed} = :gen_tcp.recv(socket, 0, 20_000)
  end

  @tag :slow
  test "a client that does not read holds up its own stream, and nobody else" do
    {llm, port} = serve(max_body_bytes: 8_000_000)
    options = [:binary, active: false, recbuf: 4096]
    {:ok, socket} = :gen_tcp.connect({127, 0, 0, 1}, port, options)
    # More than the buffers between the two take of it: with the head, what is granted twice.
    chunk = "chunk:#{String.duplicate("x", 60_000)};"
    post(socket, "head:200;#{String.duplicate(chunk, 127)}end")
    assert eventually(fn -> ask(llm, "credit") in [{:ok, "0"}, {:ok, "64"}] end)
    for _ <- 1..20, do: assert(port |> connect() |> post("answer:200:yes") |> read_until("yes"))
    assert {:ok, granted} = ask(llm, "credit")
    assert granted in ["0", "64"]
    assert byte_size(read_until(socket, "0\r\n\r\n")) > 127 * 60_000
    assert eventually(fn -> ask(llm, "credit") == {:ok, "128"} end)
  end

  for {what, steps} <- [{"an answer", "hold"}, {"a stream", "head:200;chunk:one;hold"}] do
    test "a client that goes before #{what} has ended frees its place" do
      {llm, port} = serve(max_concurrent_requests: 1)
      socket = port |> connect() |> post(unquote(steps))
      await_held(llm, 1)
      refused = port |> connect() |> post("answer:200:yes") |> read_until("}\n}")
      assert "HTTP/1.1 429 Too Many Requests\r\n" <> _ = refused
      assert refused =~ "retry-after: 1\r\n"
      :ok = :gen_tcp.close(socket)
      await_held(llm, 0)
      assert eventually(fn -> in_flight(llm) == 0 end)
      assert port |> connect() |> post("answer:200:yes") |> read_until("yes")
    end
  end

  test "of many requests at once as many are let in as may be, in all and of a key" do
    keys = ["sk-all", {"sk-two", max_concurrent_requests: 2}]
    {llm, port} = serve(max_concurrent_requests: 5, api_keys: keys)

    ask = fn key ->
      socket = port |> connect() |> post("hold", ["authorization: Bearer #{key}"])
      :ok = :inet.setopts(socket, active: :once)
      socket
    end

    # One that is held is not answered.
    for {key, held} <- [{"sk-two", 2}, {"sk-all", 3}] do
      sockets = for _ <- 1..20, do: ask.(key)

      refused =
        for _ <- 1..(20 - held) do
          assert_receive {:tcp, socket, "HTTP/1.1 429 " <> _}, 20_000
          socket
        end

      assert length(sockets -- refused) == held
    end

    await_held(llm, 5)
    assert in_flight(llm) == 5
    refute_received {:tcp, _socket, _data}
  end

  test "a client that goes is noticed though it has sent more than its request" do
    {llm, port} = serve()
    socket = port |> connect() |> post("hold")
    await_held(llm, 1)
    :ok = :gen_tcp.send(socket, "G")
    :ok = :gen_tcp.close(socket)
    await_held(llm, 0)
  end

  test "a worker that dies ends an open stream with an event, and the next request is served" do
    {_llm, port} = serve()
    socket = connect(port)
    ended = socket |> post("head:200;chunk:one;kill") |> read_until("0\r\n\r\n")
    assert ended =~ ~s(data: {"error": {"code": "engine_dead")
    assert ended =~ "data: [DONE]\n\n"
    assert socket |> post("answer:200:yes") |> read_until("yes")
  end

  defp preparing(server),
    do: for({{:preparing, _}, task, _, _} <- Supervisor.which_children(server), do: task)

  # With which the worker was told to make the app.
  defp settings(llm) do
    {:ok, told} = ask(llm, "http")
    ~r/{[^}]*}/ |> Regex.scan(told) |> List.flatten() |> Enum.sort()
  end

  test "a worker makes vLLM's app ready for those who name its engine: at once, and when it starts" do
    llm = start!()
    assert ask(llm, "http") == {:ok, "[]"}
    models = [{"plain", llm}, [engine: llm, name: "tools", tool_call_parser: "hermes"]]
    server = start_supervised!({Server, models: models, port: 0})

    assert eventually(fn -> preparing(server) == [] end)
    settings = ["{'tool_call_parser': 'hermes'}", "{}"]
    assert settings(llm) == settings
    {:error, _killed} = ask(llm, "kill")
    assert settings(llm) == settings
  end

  test "an engine that does not start keeps no server from the others, and its end ends what waits for it" do
    start_supervised!({VLLM.FakeEngine, name: :hanging, model: "hang"})
    server = start_supervised!({Server, models: [start!(), :hanging], port: 0})
    assert eventually(fn -> match?([_], preparing(server)) end)
    [waiting] = preparing(server)
    monitor = Process.monitor(waiting)
    :ok = VLLM.stop(:hanging)
    assert_receive {:DOWN, ^monitor, :process, _task, :normal}, 5_000
    port = URI.parse(Server.url(server)).port
    assert port |> connect() |> post("answer:200:yes") |> read_until("yes")
  end

  test "what was queued in a worker that dies is served after the restart", %{tmp_dir: tmp_dir} do
    {_llm, port} = serve()
    steps = "once:#{tmp_dir}/died:kill;answer:200:yes"
    assert "HTTP/1.1 200 OK" <> _ = port |> connect() |> post(steps) |> read_until("yes")
  end

  @tag :slow
  test "of 256 streams at once those that are left are aborted, and a death ends the others with an event" do
    {llm, port} = serve()
    sockets = for _ <- 1..256, do: port |> connect() |> post("head:200;chunk:one;hold")
    for socket <- sockets, do: read_until(socket, "one\r\n")
    await_held(llm, 256)
    {gone, stay} = Enum.split(sockets, 128)
    Enum.each(gone, &:gen_tcp.close/1)
    await_held(llm, 128)
    killed = port |> connect() |> post("kill") |> read_until("}\n}")
    assert "HTTP/1.1 500 " <> _ = killed
    assert killed =~ ~s("code": "poison")
    for socket <- stay, do: assert(read_until(socket, "0\r\n\r\n") =~ ~s("code": "engine_dead"))
    assert port |> connect() |> post("answer:200:yes") |> read_until("yes")
  end

  test "whatever bytes come, they are met with no fault, the next request is served and no connection is left" do
    models = [{"one", :nobody}, {"another", :nobody}]
    port = URI.parse(Server.url(start_supervised!({Server, models: models, port: 0}))).port
    :rand.seed(:exsss, {1, 2, 3})

    log =
      ExUnit.CaptureLog.capture_log(fn ->
        statuses = HTTPBytes.ask(port, 300)
        assert %{400 => _} = statuses
        assert Enum.filter(statuses, fn {status, _count} -> status >= 500 end) == []
      end)

    refute log =~ "A request over HTTP has met a fault"
    socket = connect(port)
    :ok = :gen_tcp.send(socket, "GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert read_until(socket, "\r\n\r\nok\n")
    # That one is still open.
    assert eventually(fn -> length(connections()) == 1 end)
  end

  test "requests end with the server, and nothing of them is left" do
    {llm, port} = serve()
    socket = port |> connect() |> post("head:200;chunk:one;hold")
    read_until(socket, "one\r\n")
    :ok = stop_supervised({Server, 0})
    assert {:error, :closed} = :gen_tcp.recv(socket, 0, 20_000)
    await_held(llm, 0)
    assert {:error, :econnrefused} = :gen_tcp.connect({127, 0, 0, 1}, port, [])
  end

  test "a body that is too large, and a method that there is not" do
    {_llm, port} = serve(max_body_bytes: 100)
    socket = port |> connect() |> post("answer:200:#{String.duplicate("x", 100)}")
    refused = read_until(socket, "}\n}")
    assert "HTTP/1.1 413 " <> _ = refused
    assert refused =~ ~s("code": "body_too_large")
    assert {:error, :closed} = :gen_tcp.recv(socket, 0, 20_000)
    socket = connect(port)
    :ok = :gen_tcp.send(socket, "BREW /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert "HTTP/1.1 405 Method Not Allowed\r\n" <> refused = read_until(socket, "}\n}")
    assert refused =~ ~s("code": "method_not_allowed")
    assert socket |> post("answer:200:yes") |> read_until("yes")
  end

  for {what, options, length, status} <- [
        {"that is too large", [], 5_000_000, 413},
        {"of a client without a key", [api_keys: ["sk-secret"]], 4_000_000, 401}
      ] do
    test "a body #{what} is refused before it is there" do
      {_llm, port} = serve(unquote(options))
      rest = unquote(length) - 65_536
      part = String.duplicate("x", 65_536)
      socket = port |> connect() |> begin(["content-length: #{unquote(length)}"], part)
      refused = read_until(socket, "}\n}")
      assert String.starts_with?(refused, "HTTP/1.1 #{unquote(status)} ")
      assert refused =~ "connection: close\r\n"
      # What still comes is not kept.
      :ok = :gen_tcp.send(socket, String.duplicate("x", rest - 1))
      [connection] = connections()

      {:binary, binaries} = Process.info(connection, :binary)
      assert binaries |> Enum.map(&elem(&1, 1)) |> Enum.sum() < 1_000_000
      :ok = :gen_tcp.close(socket)
      assert eventually(fn -> connections() == [] end)
    end
  end

  test "a body may come in chunks, and no more of them than a body may have" do
    {_llm, port} = serve(max_body_bytes: 1000)
    body = ~s({"model": "ready", "prompt": "answer:200:yes"})
    socket = connect(port)

    for size <- [1, 7, 1000] do
      chunks =
        for <<piece::binary-size(1) <- body>>, reduce: [""] do
          [last | done] when byte_size(last) < size -> [last <> piece | done]
          full -> [piece | full]
        end

      sent =
        for chunk <- Enum.reverse(chunks),
            do: [Integer.to_string(byte_size(chunk), 16), "; a=b\r\n", chunk, "\r\n"]

      begin(socket, ["Transfer-Encoding: Chunked"], [sent, "0\r\ntrailer: x\r\n\r\n"])
      assert read_until(socket, "yes")
    end

    for {chunks, status} <- [
          {"3E9\r\n", 413},
          {["1F4\r\n", String.duplicate("x", 500), "\r\n1F5\r\n"], 413},
          {"FFFFFFFFFFFFFFFF\r\n", 400},
          {"-1\r\n", 400},
          {"2\r\nabc\r\n", 400},
          {String.duplicate("1", 5000), 400},
          {["0\r\n", String.duplicate("a: b\r\n", 2000)], 400}
        ] do
      socket = port |> connect() |> begin(["transfer-encoding: chunked"], chunks)
      assert {chunks, "HTTP/1.1 #{status} "} == {chunks, socket |> read_until("}\n}") |> head()}
    end
  end

  defp head(answer), do: binary_part(answer, 0, 13)

  test "a head that two programs could read differently is refused, in OpenAI's shape" do
    {_llm, port} = serve()
    post = "POST /v1/completions HTTP/1.1\r\nhost: a\r\n"

    for {sent, status, code} <- [
          {"hello\r\n\r\n", 400, "malformed_request"},
          {"GET /health HTTP/2.0\r\nhost: a\r\n\r\n", 400, "malformed_request"},
          {"GET health HTTP/1.1\r\nhost: a\r\n\r\n", 400, "malformed_request"},
          {"GET /health HTTP/1.1\r\n\r\n", 400, "malformed_request"},
          {"GET /health HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400, "malformed_request"},
          {"GET /health HTTP/1.1\r\nhost: a\r\n b\r\n\r\n", 400, "malformed_request"},
          {"GET /health HTTP/1.1\r\nhost: a\r\nb : c\r\n\r\n", 400, "malformed_request"},
          {"GET /health HTTP/1.1\r\nhost: a\r\nb: \0\r\n\r\n", 400, "malformed_request"},
          {post <> "content-length: 1\r\ncontent-length: 2\r\n\r\n", 400, "malformed_request"},
          {post <> "content-length: +1\r\n\r\n", 400, "malformed_request"},
          {post <> "content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400,
           "malformed_request"},
          {post <> "transfer-encoding: gzip, chunked\r\n\r\n", 400, "malformed_request"},
          {"GET /#{String.duplicate("x", 40_000)} HTTP/1.1\r\nhost: a\r\n\r\n", 431,
           "head_too_large"}
        ] do
      socket = connect(port)
      :ok = :gen_tcp.send(socket, sent)
      refused = read_until(socket, "}\n}")
      assert {sent, "HTTP/1.1 #{status} "} == {sent, head(refused)}
      assert refused =~ ~s("code": "#{code}")
      assert {:error, :closed} = :gen_tcp.recv(socket, 0, 20_000)
    end

    # As a proxy is asked, with the empty line that some clients send after a body.
    socket = connect(port)
    sent = "\r\nGET http://localhost:1/health HTTP/1.1\r\nHOST:\tlocalhost \r\n\r\n"
    :ok = :gen_tcp.send(socket, sent)
    assert "HTTP/1.1 200 OK\r\n" <> _ = read_until(socket, "\r\n\r\nok\n")
  end

  test "requests that are sent before the answers are answered one after the other" do
    {_llm, port} = serve()
    socket = connect(port)
    for word <- ["one", "two", "three"], do: post(socket, "answer:200:#{word}")

    assert [_, "one" <> _, "two" <> _, "three"] =
             socket |> read_until("three") |> String.split("\r\n\r\n")
  end

  test "a client that asks whether its body is wanted is told so, or why not" do
    {_llm, port} = serve(api_keys: ["sk-secret"])
    body = ~s({"model": "ready", "prompt": "answer:200:yes"})
    headers = ["content-length: #{byte_size(body)}", "expect: 100-continue"]
    key = "authorization: Bearer sk-secret"
    socket = port |> connect() |> begin([key | headers])
    assert read_until(socket, "HTTP/1.1 100 Continue\r\n\r\n")
    :ok = :gen_tcp.send(socket, body)
    assert read_until(socket, "yes")
    assert "HTTP/1.1 401 " <> _ = port |> connect() |> begin(headers) |> read_until("}\n}")
  end

  test "one client more than may be connected is told so, until another has gone" do
    {llm, port} = serve(max_connections: 2)
    [one, _two] = for _ <- 1..2, do: port |> connect() |> post("hold")
    await_held(llm, 2)
    refused = port |> connect() |> post("answer:200:yes") |> read_until("}\n}")
    assert "HTTP/1.1 503 Service Unavailable\r\n" <> _ = refused
    assert refused =~ ~s("code": "overloaded")
    assert refused =~ "retry-after: 1\r\n"
    :ok = :gen_tcp.close(one)
    assert eventually(fn -> length(connections()) == 1 end)
    assert port |> connect() |> post("answer:200:yes") |> read_until("yes")
  end

  test "a body of several parts is what was sent, and takes little more memory than it has bytes" do
    {llm, port} = serve()
    text = for number <- 1..30_000, into: "", do: "#{number}, "
    socket = port |> connect() |> post("answer:200:#{text}")
    assert "HTTP/1.1 200 OK" <> _ = read_until(socket, text)
    post(socket, "hold:#{String.duplicate(text, 10)}")
    await_held(llm, 1)

    for connection <- connections() do
      assert {:memory, bytes} = Process.info(connection, :memory)
      assert bytes < 1_000_000
    end

    :gen_tcp.close(socket)
  end

  # What a connection that serves `core` answers to what is sent, with no patience for more.
  defp answered(sent, core) do
    served = %{core: core, hosts: :any, max_body_bytes: 100_000, idle: 50, patience: 50}
    {:ok, listening} = :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}])
    {:ok, port} = :inet.port(listening)
    client = connect(port)
    {:ok, socket} = :gen_tcp.accept(listening)
    :ok = :gen_tcp.send(client, sent)
    serve = fn -> receive(do: (:go -> VLLM.Server.Connection.serve(socket, served))) end
    serving = Task.async(serve)
    :ok = :gen_tcp.controlling_process(socket, serving.pid)
    send(serving.pid, :go)
    answer = :gen_tcp.recv(client, 0, 20_000)
    :ok = :gen_tcp.close(client)
    assert Task.await(serving, 20_000) == :ok
    :ok = :gen_tcp.close(listening)
    answer
  end

  test "what does not come is not waited for" do
    core = core(models: [:none])
    post = "POST /v1/completions HTTP/1.1\r\nhost: a\r\n"
    assert {:error, :closed} = answered("", core)

    for late <- [
          "POST",
          post <> "content-length: 100000\r\n\r\n",
          post <> "content-length: 100000\r\n\r\nx",
          post <> "content-length: 100000\r\n\r\n#{String.duplicate("x", 65_537)}",
          post <> "transfer-encoding: chunked\r\n\r\n5\r\nx"
        ] do
      assert {:ok, "HTTP/1.1 408 Request Timeout\r\n" <> refused} = answered(late, core)
      assert refused =~ ~s("code": "body_incomplete")
    end
  end

  defp core(options) do
    {:ok, known} = VLLM.Options.only(options, VLLM.Options.openai())
    {:ok, core} = VLLM.OpenAI.new(known, make_ref())
    core
  end

  test "the admin API is served beside it, with its errors and its events" do
    {llm, port} = serve(web: true, api_keys: [{"sk-admin", admin: true}, "sk-plain"])
    key = "authorization: Bearer sk-admin\r\n"

    ask = fn request, headers ->
      socket = connect(port)
      :ok = :gen_tcp.send(socket, [request, " HTTP/1.1\r\nhost: localhost\r\n", headers, "\r\n"])
      socket
    end

    assert "HTTP/1.1 200 OK" <> told = "GET /api/v1/engines" |> ask.(key) |> read_until("\n}")
    assert told =~ ~s("id": "#{VLLM.Web.Engine.id(llm.id)}")
    assert told =~ "cache-control: no-store\r\n"
    assert "HTTP/1.1 401 " <> _ = "GET /api/v1/engines" |> ask.("") |> read_until("\n}")
    delete = "DELETE /api/v1/quantize/jobs/x?outputs=true"
    assert "HTTP/1.1 403 " <> _ = delete |> ask.(key) |> read_until("\n}")

    assert "HTTP/1.1 404 " <> none =
             delete |> ask.(["x-requested-with: vllm\r\n" | key]) |> read_until("\n}")

    assert none =~ ~s("reason": "job_not_found")

    # What is refused before its body is there has the same shape.
    long = [
      "content-type: application/json\r\ncontent-length: 9000000\r\n",
      key,
      "\r\n",
      String.duplicate("x", 65_536)
    ]

    refused = "POST /api/v1/engines" |> ask.(long) |> read_until("\n}")
    assert "HTTP/1.1 413 " <> _ = refused
    assert refused =~ ~s("reason": "body_too_large")

    # One who reads events is noticed when he goes.
    events = ask.("GET /api/v1/events", key)
    assert read_until(events, "\n\n\r\n") =~ "event: state\ndata: {"
    assert [_place] = places()
    :ok = :gen_tcp.close(events)
    assert eventually(fn -> places() == [] end)
  end

  # Of those who read events.
  defp places, do: Registry.select(VLLM.Places, [{{{{:_, :events}, :_}, :"$1", :_}, [], [:"$1"]}])

  test "a port that is taken is an error, and so are wrong options" do
    {_llm, port} = serve()
    Process.flag(:trap_exit, true)

    assert {:error, %Error{reason: :invalid_option} = error} =
             Server.start_link(models: [:a], port: port)

    assert error.message =~
             "cannot listen on 127.0.0.1, port #{port}: address already in use. Something"

    assert {:error, %Error{} = error} = Server.start_link(models: [:a], prt: 1)
    assert error.message =~ "Did you mean `port`?"

    assert_raise Error, ~r/`ip` must be an address/, fn ->
      Server.child_spec(models: [:a], ip: "all")
    end
  end

  test "without keys only this machine's own names are taken, or those that are given" do
    ask = fn port, host ->
      socket = connect(port)
      :ok = :gen_tcp.send(socket, "GET /health HTTP/1.1\r\nhost: #{host}\r\n\r\n")
      {:ok, "HTTP/1.1 " <> <<status::binary-size(3)>> <> _} = :gen_tcp.recv(socket, 0, 20_000)
      status
    end

    {_llm, port} = serve()
    here = ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]", "a.localhost", "127.1.2.3"]
    for host <- here, do: assert({host, ask.(port, host)} == {host, "200"})

    there = [
      "evil.example",
      "localhost.evil.example",
      "127.0.0.1.evil.example:80",
      "10.0.0.1",
      "\xff"
    ]

    for host <- there, do: assert({host, ask.(port, host)} == {host, "403"})
    stop_supervised!({Server, 0})

    for {options, host, status} <- [
          {[hosts: ["llm.example", "*.lan"]], "llm.example:80", "200"},
          {[hosts: ["llm.example", "*.lan"]], "box.lan", "200"},
          {[hosts: ["llm.example", "*.lan"]], "localhost", "403"},
          {[api_keys: ["sk-secret"]], "evil.example", "200"},
          {[ip: {0, 0, 0, 0}], "evil.example", "200"}
        ] do
      server = start_supervised!({Server, [models: [:a], port: 0] ++ options})
      assert {options, ask.(URI.parse(Server.url(server)).port, host)} == {options, status}
      stop_supervised!({Server, 0})
    end
  end

  test "keys are in no report of the server's" do
    {_llm, port} = serve(api_keys: ["sk-secret"])
    {:ok, supervisor} = ExUnit.fetch_test_supervisor()
    {:ok, spec} = :supervisor.get_childspec(supervisor, {Server, 0})
    refute inspect(spec) =~ "sk-secret"
    answer = port |> connect() |> post("answer:200:yes", ["authorization: Bearer sk-secret"])
    assert read_until(answer, "yes")

    assert "HTTP/1.1 401 " <> _ =
             port |> connect() |> post("answer:200:yes") |> read_until("}\n}")
  end

  test "a fault is answered as one, and tells the log where it was, but no key" do
    core = %{core(models: [:none], api_keys: ["sk-secret"]) | models: [:wrong]}
    head = "GET /v1/models HTTP/1.1\r\nhost: a\r\nauthorization: Bearer sk-secret\r\n\r\n"

    log =
      ExUnit.CaptureLog.capture_log(fn ->
        assert {:ok, "HTTP/1.1 500 Internal Server Error\r\n" <> answer} = answered(head, core)
        assert answer =~ ~s("code": "internal")
      end)

    assert log =~ "A request over HTTP has met a fault"
    assert log =~ "lib/vllm/openai.ex"
    refute log =~ "sk-secret"
  end
end
