# What VLLM.Plug uses of Plug, in a few lines: the package is not here.
defmodule Plug do
  @callback init(term()) :: term()
  @callback call(map(), term()) :: map()
end

defmodule Plug.Conn.Unfetched do
  defstruct [:aspect]
end

defmodule Plug.Conn do
  defstruct [
    :body,
    :status,
    method: "POST",
    path_info: [],
    request_path: "/",
    query_string: "",
    req_headers: [],
    resp_headers: [],
    sent: [],
    room: :infinity,
    halted: false,
    body_params: %Plug.Conn.Unfetched{}
  ]

  def read_body(%{body: {:error, reason}}, _options), do: {:error, reason}
  def read_body(conn, length: limit) when byte_size(conn.body) > limit, do: {:more, "", conn}
  def read_body(conn, _options), do: {:ok, conn.body, conn}
  def put_resp_header(conn, name, value), do: update_in(conn.resp_headers, &[{name, value} | &1])
  def send_resp(conn, status, body), do: %{conn | status: status, sent: [body]}
  def send_chunked(conn, status), do: %{conn | status: status}
  def halt(conn), do: %{conn | halted: true}

  # As a client that goes after so many pieces.
  def chunk(%{room: 0}, _piece), do: {:error, :closed}
  def chunk(%{room: :infinity} = conn, piece), do: {:ok, update_in(conn.sent, &(&1 ++ [piece]))}
  def chunk(conn, piece), do: chunk(%{conn | room: :infinity}, piece) |> less(conn.room)
  defp less({:ok, conn}, room), do: {:ok, %{conn | room: room - 1}}
end

for file <- ["plug.ex", "web/plug.ex"],
    do: Code.compile_file(Path.expand("../../lib/vllm/" <> file, __DIR__))

defmodule VLLM.PlugTest do
  use ExUnit.Case, async: true

  import VLLM.FakeEngine

  defp through(llm, fields, options \\ []) do
    conn = struct!(Plug.Conn, [req_headers: [{"content-type", "application/json"}]] ++ fields)
    VLLM.Plug.call(conn, VLLM.Plug.init([models: [llm]] ++ options))
  end

  defp body(steps), do: ~s({"model": "ready", "prompt": "#{steps}"})

  test "answers wherever it is mounted, whether the body was parsed before or not" do
    llm = start!()
    parsed = [body_params: %{"model" => "ready", "prompt" => "answer:200:yes"}]

    for path <- [["v1", "completions"], ["completions"]],
        given <- [[body: body("answer:200:yes")], parsed] do
      conn = through(llm, [path_info: path] ++ given)
      assert {200, ["yes"], true} = {conn.status, conn.sent, conn.halted}
      assert conn.resp_headers == [{"content-type", "application/json"}]
    end

    assert through(llm, path_info: ["invocations"], body: "{}").status == 404
    assert through(llm, path_info: ["health"], method: "GET", body: "").sent == ["ok\n"]
    tokenize = [path_info: ["tokenize"], body: body("answer:200:yes")]
    assert through(llm, tokenize, tokenize: true).sent == ["yes"]
    assert through(llm, tokenize).status == 404
    # Which counts what came this way, too.
    metrics = [path_info: ["metrics"], method: "GET", body: ""]
    [text] = through(llm, metrics, metrics: true).sent
    labels = %{"engine" => inspect(llm.id), "method" => "http_request", "outcome" => "ok"}
    assert VLLM.Prometheus.series(text)[{"vllm_bridge_requests_total", labels}] == 5
    # It is for whoever may use the application, unless the options say so.
    assert through(llm, metrics).status == 404
  end

  test "streams go out bit by bit, until the client goes" do
    llm = start!()

    conn =
      through(llm, path_info: ["completions"], body: body("head:200;chunk:one;chunk:two;end"))

    assert {200, ["one", "two"]} = {conn.status, conn.sent}
    steps = "head:200;chunk:one;chunk:two;hold"
    conn = through(llm, path_info: ["completions"], body: body(steps), room: 1)
    assert conn.sent == ["one"]
    await_held(llm, 0)
  end

  test "options may come from a function, when they are needed" do
    llm = start!()
    options = fn -> [models: [llm], api_keys: ["key"]] end
    conn = %Plug.Conn{path_info: ["models"], method: "GET", body: ""}
    assert VLLM.Plug.call(conn, VLLM.Plug.init(options)).status == 401
    conn = %{conn | req_headers: [{"authorization", "Bearer key"}]}
    assert VLLM.Plug.call(conn, VLLM.Plug.init(options)).status == 200
  end

  test "what a router keeps of the options has no keys in it" do
    made = VLLM.Plug.init(models: [:a], api_keys: ["sk-secret"], allowed_models: [~r/a/])
    refute inspect(made, structs: false) =~ "sk-secret"
    # Phoenix makes it when it compiles.
    assert {^made, _binding} = made |> Macro.escape() |> Code.eval_quoted()
  end

  test "the admin API, its page and all else are below where they are mounted, whoever read the body" do
    llm = start!()
    options = VLLM.Web.Plug.init(models: [llm], api_keys: [{"admin", admin: true}])
    headers = [{"authorization", "Bearer admin"}, {"content-type", "application/json"}]

    ask = fn fields ->
      VLLM.Web.Plug.call(
        struct!(Plug.Conn, [req_headers: headers, method: "GET", body: ""] ++ fields),
        options
      )
    end

    conn = ask.(path_info: ["api", "v1", "engines"])
    assert {200, true} = {conn.status, conn.halted}
    {:ok, %{"engines" => engines}} = VLLM.JSON.decode(hd(conn.sent))
    id = VLLM.Web.Engine.id(llm.id)
    assert id in Enum.map(engines, & &1["id"])

    for given <- [[body: "{}"], [body_params: %{}]] do
      conn = ask.([path_info: ["api", "v1", "engines", id, "resume"], method: "POST"] ++ given)
      assert {202, true} = {conn.status, conn.halted}
    end

    assert ask.(path_info: ["api", "v1", "engines"], req_headers: []).status == 401
    complete = [path_info: ["v1", "completions"], method: "POST", body: body("answer:200:yes")]
    assert ask.(complete).sent == ["yes"]

    # The page must be where its files are found from.
    moved = ask.(path_info: [], request_path: "/llm")

    assert {308, {"location", "/llm/"}} =
             {moved.status, List.keyfind(moved.resp_headers, "location", 0)}

    assert ask.(path_info: [], request_path: "/llm/").status in [200, 404]

    large = VLLM.Web.Plug.init(fn -> [max_body_bytes: 4] end)
    conn = %Plug.Conn{path_info: ["api", "v1", "engines"], body: "12345", req_headers: headers}
    conn = VLLM.Web.Plug.call(conn, large)
    assert {413, [text]} = {conn.status, conn.sent}
    assert text =~ ~s("reason": "body_too_large")

    assert through(llm, path_info: ["api", "v1", "engines"], method: "GET", body: "").status ==
             404
  end

  test "a body that is too large, or does not come" do
    llm = start!()

    for {body, status, code} <- [
          {"12345", 413, "body_too_large"},
          {{:error, :timeout}, 408, "body_incomplete"}
        ] do
      conn = through(llm, [path_info: ["completions"], body: body], max_body_bytes: 4)
      assert {conn.status, conn.halted} == {status, true}
      assert [text] = conn.sent
      assert text =~ ~s("code": "#{code}")

      # Nobody reads it for a client without a key.
      conn = through(llm, [path_info: ["completions"], body: body], api_keys: ["key"])
      assert conn.status == 401
    end
  end

  test "options that are wrong are said when the application is made" do
    for wrong <- [[], [models: []], [models: [:a], api_keys: "sk"], [models: [:a], keys: ["sk"]]] do
      error = assert_raise VLLM.Error, fn -> VLLM.Plug.init(wrong) end
      assert error.reason == :invalid_option
    end
  end
end
