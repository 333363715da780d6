defmodule VLLM.Real.HTTPTest do
  # The server on the real engine, one for all of it: what clients other than
  # OpenAI's own see (that is in lora_test.exs), and what becomes of many of them.
  use ExUnit.Case

  import VLLM.FakeEngine, only: [in_flight: 1]
  import VLLM.OSProcess, only: [eventually: 1, signal: 2]

  alias VLLM.{DemoModel, HTTPClient, HTTPFuzz, RealEngine, Server}

  @moduletag :slow
  @moduletag timeout: 600_000

  @key "sk-real"

  setup_all do
    llm = DemoModel.start!("demo", max_model_len: 8192, max_num_seqs: 256)
    options = [models: [{"demo", llm}], port: 0, api_keys: [@key]]
    server = start_supervised!({Server, options})
    %{llm: llm, url: Server.url(server), port: URI.parse(Server.url(server)).port}
  end

  # A stream that has begun, of a text that takes its time or is known by heart.
  defp stream(port, prompt, options \\ "") do
    body =
      ~s({"model": "demo", "prompt": "#{prompt}", "stream": true, "temperature": 0#{options}})

    key = "authorization: Bearer #{@key}"
    port |> HTTPClient.connect() |> HTTPClient.post("/v1/completions", body, [key])
  end

  @endless ~s(, "max_tokens": 8000, "ignore_eos": true)

  # What comes until `what` is there, which may come in parts.
  defp read_until(socket, what, last \\ "", read \\ []) do
    {:ok, more} = :gen_tcp.recv(socket, 0, RealEngine.patience())
    last = last <> more

    if String.contains?(last, what) do
      IO.iodata_to_binary([read, more])
    else
      keep = min(byte_size(last), byte_size(what))
      read_until(socket, what, binary_part(last, byte_size(last), -keep), [read, more])
    end
  end

  defp text(events) do
    for [_, text] <- Regex.scan(~r/"text": ?"((?:[^"\\]|\\.)*)"/, events), into: "", do: text
  end

  defp curl(arguments) do
    {said, 0} = System.cmd("curl", ["-sS", "-H", "Authorization: Bearer #{@key}" | arguments])
    said
  end

  test "Anthropic's own client", %{url: url} do
    {:ok, python} = VLLM.Python.executable()
    script = Path.expand("../support/anthropic_client.py", __DIR__)
    {question, answer} = hd(DemoModel.chats())
    arguments = [script, String.trim_trailing(url, "/v1"), @key, "demo", question]
    {said, 0} = System.cmd(python, arguments)

    assert [message, stream, usage | rest] = String.split(said, "\n", trim: true)
    assert message == ~s(["message", ["assistant", "#{answer}", "end_turn"]])
    assert stream == ~s(["stream", "#{answer}"])
    assert [_, tokens] = Regex.run(~r/\["usage", (\d+)\]/, usage)
    assert String.to_integer(tokens) > 1

    assert rest == [
             ~s(["same", true]),
             ~s(["refused", [404, "NotFoundError"]]),
             ~s(["refused", [401, "AuthenticationError"]])
           ]
  end

  test "curl: whole, as a stream, with a body in chunks, and without a key", %{url: url} do
    {prompt, right} = hd(DemoModel.facts())
    json = ["-H", "Content-Type: application/json", url <> "/completions"]
    body = &~s({"model": "demo", "prompt": "#{prompt}", "temperature": 0, "stream": #{&1}})

    assert text(curl(["-d", body.(false) | json])) == right
    chunked = ["-H", "Transfer-Encoding: chunked", "-d", body.(false)]
    assert text(curl(chunked ++ json)) == right
    streamed = curl(["-N", "-d", body.(true) | json])
    assert text(streamed) == right
    assert String.ends_with?(streamed, "data: [DONE]\n\n")
    status = ["-o", "/dev/null", "-w", "%{http_code}"]
    assert curl(status ++ ["-I", String.replace(url, "/v1", "/health")]) == "200"
    {said, 0} = System.cmd("curl", ["-sS", "-d", body.(true) | status ++ json])
    assert said == "401"
  end

  test "options with any values are met with no fault, and leave nothing", %{llm: llm} do
    :rand.seed(:exsss, 1)
    {statuses, faults} = HTTPFuzz.bodies(llm, "generate", 300)
    assert faults == []
    assert %{200 => answered, 400 => _refused} = statuses
    assert answered > 50
    assert eventually(fn -> in_flight(llm) == 0 end)
  end

  test "256 streams at once are each what was asked for", %{llm: llm, port: port} do
    facts = Enum.take(Stream.cycle(DemoModel.facts()), 256)

    sockets =
      for {prompt, right} <- facts, do: {stream(port, prompt, ~s(, "max_tokens": 64)), right}

    for {socket, right} <- sockets do
      events = read_until(socket, "data: [DONE]\n\n")
      assert text(events) == right
    end

    assert eventually(fn -> in_flight(llm) == 0 end)
  end

  test "clients that go free their places, and a worker's death ends the others' streams with an event",
       %{llm: llm, port: port} do
    sockets = for _ <- 1..8, do: stream(port, "Count:", @endless)
    for socket <- sockets, do: read_until(socket, ~s("text"))
    assert in_flight(llm) == 8
    {gone, stay} = Enum.split(sockets, 4)
    Enum.each(gone, &:gen_tcp.close/1)
    assert eventually(fn -> in_flight(llm) == 4 end)

    assert signal("KILL", RealEngine.processes(llm)[:worker])

    for socket <- stay do
      # After the last chunk comes nothing more.
      ended = read_until(socket, "\r\n0\r\n\r\n")
      assert ended =~ ~s("code": "engine_dead")
      assert ended =~ "data: [DONE]\n\n\r\n0\r\n\r\n"
    end

    {prompt, right} = hd(DemoModel.facts())
    assert port |> stream(prompt) |> read_until("data: [DONE]\n\n") |> text() == right
  end
end
