defmodule VLLM.HubServer do
  @moduledoc """
  A hub for tests: `python/tests/hub_server.py` over a folder of repositories, on this machine. The
  library and huggingface_hub's client are the real ones; they find it by `HF_ENDPOINT`.
  """

  @script Path.expand("../../python/tests/hub_server.py", __DIR__)

  @enforce_keys [:endpoint, :folder, :cache]
  defstruct @enforce_keys

  @doc "Starts one over an empty folder below `folder`; it ends with the process that calls this."
  def start(folder) do
    repositories = Path.join(folder, "hub")
    File.mkdir_p!(repositories)

    port =
      Port.open({:spawn_executable, VLLM.TestPython.executable!()}, [
        :binary,
        {:line, 10_000},
        args: [@script, repositories]
      ])

    receive do
      {^port, {:data, {:eol, line}}} ->
        [_, endpoint] = Regex.run(~r/"endpoint": "(.+?)"/, line)
        %__MODULE__{endpoint: endpoint, folder: repositories, cache: Path.join(folder, "cache")}
    after
      60_000 -> raise "the stand-in for the hub did not start"
    end
  end

  @doc "The environment of a worker that is to know this hub and no other, nor what this machine has of models."
  def env(server) do
    %{
      "HF_ENDPOINT" => server.endpoint,
      "HF_HOME" => server.cache,
      "HF_TOKEN" => nil,
      "HF_HUB_OFFLINE" => nil
    }
  end

  @doc """
  Puts a model on the hub: a map from names of files to what is in them, or `{:link, path}` for
  what a file is. `about` is what the hub tells beside (see `hub_server.py`).
  """
  def put(server, name, files, about \\ %{}) do
    folder = Path.join(server.folder, name)
    File.mkdir_p!(folder)

    for {file, content} <- Map.put(files, ".hub.json", VLLM.JSON.encode(about)) do
      path = Path.join(folder, file)
      File.mkdir_p!(Path.dirname(path))

      case content do
        {:link, source} -> File.ln_s!(source, path)
        content -> File.write!(path, content)
      end
    end

    :ok
  end

  @doc "Sets what goes wrong from now on: a list of maps with the fields of `hub_server.py`'s `Fault`."
  def set_faults(server, faults) do
    request(server, "POST", "/faults", VLLM.JSON.encode(faults))
    :ok
  end

  @doc "What was asked of it, as JSON."
  def requests(server), do: request(server, "GET", "/requests", "")

  defp request(server, method, path, body) do
    %URI{host: host, port: port} = URI.parse(server.endpoint)
    {:ok, socket} = :gen_tcp.connect(to_charlist(host), port, [:binary, active: false])

    head = "#{method} #{path} HTTP/1.1\r\nHost: #{host}\r\nConnection: close\r\n"
    :ok = :gen_tcp.send(socket, "#{head}Content-Length: #{byte_size(body)}\r\n\r\n#{body}")
    [_head, answer] = socket |> read("") |> String.split("\r\n\r\n", parts: 2)
    answer
  end

  defp read(socket, read) do
    case :gen_tcp.recv(socket, 0, 60_000) do
      {:ok, bytes} -> read(socket, read <> bytes)
      {:error, :closed} -> read
    end
  end
end
